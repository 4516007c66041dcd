import os

import numpy as np
import pytest

from wasi_export.config import Frozen
from wasi_export.errors import IntegrityError, UsageError
from wasi_export.runtimes.state_folder import BEST, PREVIOUS, STATE, StateFolder, locked_folder, read_state


class Step(Frozen):
    step: int


@pytest.fixture
def folder(tmp_path):
    return StateFolder(tmp_path / "state", Step)


def tensors(value):
    return {"blocks.0.left": np.full((2, 3), value, np.float32)}


def test_what_was_committed_is_read(folder):
    assert folder.read() is None
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(2))
    progress, found = folder.read()
    assert progress == Step(step=2)
    np.testing.assert_array_equal(found["blocks.0.left"], tensors(2)["blocks.0.left"])
    np.testing.assert_array_equal(read_state(folder.path)["blocks.0.left"], tensors(2)["blocks.0.left"])


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


@pytest.mark.parametrize("call", range(1, 5))
def test_a_commit_that_is_cut_off_at_any_rename_or_sync_loses_nothing(folder, monkeypatch, call):
    folder.commit(Step(step=1), tensors(1))
    folder.commit(Step(step=2), tensors(2))
    calls = 0

    def counted(original):
        def run(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return run

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    with pytest.raises(KeyboardInterrupt):
        folder.commit(Step(step=3), tensors(3))
    monkeypatch.undo()
    assert folder.read()[0].step in (2, 3)
    folder.clean()
    assert {path.name for path in folder.path.iterdir()} <= {STATE, PREVIOUS}


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        StateFolder(tmp_path / "file", Step).commit(Step(step=1), tensors(1))


def test_the_best_state_is_kept_apart(folder):
    folder.commit(Step(step=1), tensors(1))
    folder.keep_best(tensors(5))
    folder.commit(Step(step=2), tensors(2))
    np.testing.assert_array_equal(folder.best()["blocks.0.left"], tensors(5)["blocks.0.left"])
    assert (folder.path / BEST).exists()


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with (
        locked_folder(tmp_path / "state"),
        pytest.raises(UsageError, match="in use by another process"),
        locked_folder(tmp_path / "state"),
    ):
        pass
    with locked_folder(tmp_path / "state"):
        pass


def test_no_state_says_what_to_give(tmp_path):
    with pytest.raises(IntegrityError, match="give the folder that `wasi-export adapt` wrote"):
        read_state(tmp_path / "nothing")
