import resource

import numpy as np
import pytest
from safetensors.numpy import save_file

from wasi_export.errors import ConfigError, IntegrityError, UsageError
from wasi_export.runtimes.state_folder import BEST, PREVIOUS, STATE, StateFolder, read_state
from wasi_export.settings import Frozen

OWNER = "a training step"


class Step(Frozen):
    step: int


class Other(Frozen):
    epoch: int


@pytest.fixture
def folder(tmp_path):
    return StateFolder(tmp_path / "state", Step, OWNER)


def tensors(value):
    return {"blocks.0.left": np.full((2, 3), value, np.float32)}


def test_what_was_committed_is_read(folder):
    assert folder.read() is None
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(2))
    progress, found = folder.read()
    assert progress == Step(step=2)
    np.testing.assert_array_equal(found["blocks.0.left"], tensors(2)["blocks.0.left"])
    np.testing.assert_array_equal(
        read_state(folder.path, OWNER)["blocks.0.left"], tensors(2)["blocks.0.left"]
    )


@pytest.mark.parametrize("damage", ["cut", "missing", "noise"])
def test_the_commit_before_is_read_where_the_last_one_is_damaged(folder, damage):
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(2))
    path = folder.path / STATE
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if damage == "cut" else b"noise" * 100)
    assert folder.read()[0] == Step(step=1)


def test_a_folder_in_which_nothing_is_whole_is_an_error(folder):
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(2))
    for name in (STATE, PREVIOUS):
        (folder.path / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match="name a new folder"):
        folder.read()


def test_a_damaged_state_does_not_take_the_place_of_the_whole_one_before(folder):
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(2))
    (folder.path / STATE).write_bytes(b"noise" * 100)
    folder.commit(Step(step=3), tensors(3))
    (folder.path / STATE).unlink()
    assert folder.read()[0] == Step(step=1)


def test_a_full_disk_is_one_clear_line_and_loses_nothing(folder):
    folder.commit(Step(step=1), tensors(1))
    limits = resource.getrlimit(
        resource.RLIMIT_FSIZE
    )  # what a full disk is to a write: an OSError in the middle
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"cannot write .*: File too large: make room"):
            folder.commit(Step(step=2), tensors(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folder.read()[0] == Step(step=1)
    assert [path.name for path in folder.path.iterdir()] == [STATE]


def test_a_state_of_another_training_step_is_refused(folder):
    folder.commit(Step(step=1), tensors(1))
    folder.keep_best(tensors(1))
    other = StateFolder(folder.path, Step, "another")
    for read in (other.read, other.best, lambda: read_state(folder.path, "another")):
        with pytest.raises(ConfigError, match=r"a state of another bundle .* give the bundle"):
            read()


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        StateFolder(tmp_path / "file", Step, OWNER).commit(Step(step=1), tensors(1))


def test_the_best_state_is_kept_apart(folder):
    folder.commit(Step(step=1), tensors(1))
    folder.keep_best(tensors(5))
    folder.commit(Step(step=2), tensors(2))
    np.testing.assert_array_equal(folder.best()["blocks.0.left"], tensors(5)["blocks.0.left"])
    assert (folder.path / BEST).exists()


def test_no_state_says_what_to_give(tmp_path):
    with pytest.raises(IntegrityError, match="give the folder that `wasi-export adapt` wrote"):
        read_state(tmp_path / "nothing", OWNER)


@pytest.mark.parametrize("owner", ["", "a", "a training stepp", "z"])
def test_a_state_of_any_other_training_step_is_refused(folder, owner):
    folder.commit(Step(step=1), tensors(1))
    with pytest.raises(ConfigError, match="is a state of another bundle"):
        StateFolder(folder.path, Step, owner).read()


def test_a_state_with_another_header_is_named_with_the_reason(folder):
    folder.commit(Step(step=1), tensors(1))
    with pytest.raises(IntegrityError, match=r"state\.safetensors is not a state of this program \('epoch'"):
        StateFolder(folder.path, type("Step", (Other,), {}), OWNER).read()


def test_a_state_of_another_kind_is_neither_passed_by_nor_written_over(folder):
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(2))
    files = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    other = StateFolder(folder.path, Other, OWNER)
    for use in (other.read, lambda: other.commit(Other(epoch=1), tensors(3))):
        with pytest.raises(ConfigError, match=r"another kind \(Step, this is Other\).*: name another folder"):
            use()
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == files


def test_a_file_of_another_program_does_not_take_the_place_of_the_state_before(folder):
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(2))
    save_file(tensors(9), folder.path / STATE)
    assert folder.read()[0] == Step(step=1)
    folder.commit(Step(step=3), tensors(3))
    (folder.path / STATE).unlink()
    assert folder.read()[0] == Step(step=1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_no_numbers_is_refused(folder, value):
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(value))
    assert folder.read()[0] == Step(step=1)
