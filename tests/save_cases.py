"""Every save of ours, and a few done wrong: what the harnesses kill and cut the power of.

A case makes what is there before, saves something new over it, and reads what is there now. What is read
after a save that was cut off must be what was read before, or what is read after a whole one. No case imports
torch before it is used: a fork of a process with torch takes ten times as long.
"""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from wasi_export import durable
from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.config import Config
from wasi_export.durable import staged_folder, write_bytes
from wasi_export.errors import WasiExportError
from wasi_export.manifest import GOLDEN, MODEL
from wasi_export.ranks import Plan
from wasi_export.runtimes.state_folder import STATE, StateFolder
from wasi_export.runtimes.validate import read_report, write_report
from wasi_export.settings import Frozen

OLD, NEW = 1, 2


@dataclass(frozen=True)
class Save:
    """A save into a folder that `before` has prepared, and what is read there."""

    before: Callable[[Path], None]
    write: Callable[[Path], None]
    read: Callable[[Path], object]


def nothing(folder: Path) -> None:
    """There is nothing before."""


def tensors(value: int) -> dict[str, np.ndarray]:
    return {"blocks.0.left": np.full((2, 3), value, np.float32)}


# A file.


def write_file(value: int) -> Callable[[Path], None]:
    return lambda folder: write_bytes(folder / "deep" / "file", b"%d" % value * 100)


def read_file(folder: Path) -> object:
    path = folder / "deep" / "file"
    return path.read_bytes().decode() if path.exists() else None


def write_in_place(folder: Path) -> None:
    (folder / "deep" / "file").write_bytes(b"2" * 100)


def write_without_sync(folder: Path) -> None:
    (folder / "deep" / "new").write_bytes(b"2" * 100)
    (folder / "deep" / "new").replace(folder / "deep" / "file")


# A folder, of files that nobody else syncs.


def write_folder(value: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with staged_folder(folder / "runs" / "out", force=True) as staging:
            fill(staging, value)

    return write


def fill(folder: Path, value: int) -> None:
    (folder / "sub").mkdir()
    save_file(tensors(value), folder / "sub" / "tensors")
    (folder / "name").write_text(str(value))


def read_folder(folder: Path) -> object:
    out = folder / "runs" / "out"
    if not out.exists():
        return None
    assert {path.name for path in out.rglob("*")} == {"sub", "tensors", "name"}
    return (out / "name").read_text(), float(load_file(out / "sub" / "tensors")["blocks.0.left"][0, 0])


def write_by_two_renames(folder: Path) -> None:
    """On a file system that cannot exchange two names, as the system call says there."""
    with patch("ctypes.CDLL", lambda name: None):
        write_folder(NEW)(folder)


def read_brought_back(folder: Path) -> object:
    """What is there once the next process has begun to write, and ended before it has."""
    with contextlib.suppress(KeyboardInterrupt), staged_folder(folder / "runs" / "out", force=True):
        raise KeyboardInterrupt
    return read_folder(folder)


def write_folder_in_place(folder: Path) -> None:
    shutil.rmtree(folder / "runs" / "out", ignore_errors=True)
    (folder / "runs" / "out").mkdir()
    fill(folder / "runs" / "out", NEW)


def write_folder_without_sync(folder: Path) -> None:
    (folder / "runs" / "new").mkdir()
    fill(folder / "runs" / "new", NEW)
    durable._exchange(folder / "runs" / "new", folder / "runs" / "out")
    shutil.rmtree(folder / "runs" / "new")


# A bundle, the way `export` and `merge` write one.


def write_bundle(value: int) -> Callable[[Path], None]:
    from helpers import factors, make_manifest, make_model

    manifest = make_manifest().model_copy(update={"seed": value})

    def write(folder: Path) -> None:
        with staged_folder(folder / "bundles" / "tiny", force=True) as staging:
            (staging / "golden").mkdir()
            write_bytes(staging / MODEL, make_model())
            save_file(factors(), staging / GOLDEN)
            shutil.copyfile(staging / GOLDEN, staging / "copy.safetensors")
            write_bundle_manifest(staging, manifest)

    return write


def read_bundle(folder: Path) -> object:
    path = folder / "bundles" / "tiny"
    return Bundle.open(path).manifest.seed if path.exists() else None


# The state of a training on the board.


class Step(Frozen):
    step: int


def states(folder: Path) -> StateFolder[Step]:
    return StateFolder(folder / "state", Step, "a training step")


def commit(value: int) -> Callable[[Path], None]:
    return lambda folder: states(folder).commit(Step(step=value), tensors(value))


def commit_two(folder: Path) -> None:
    for step in (OLD - 1, OLD):
        commit(step)(folder)
        states(folder).keep_best(tensors(step))


def commit_two_and_damage(folder: Path) -> None:
    commit_two(folder)
    path = folder / "state" / STATE
    path.write_bytes(path.read_bytes()[:-1])


def commit_two_and_lose(folder: Path) -> None:
    commit_two(folder)
    (folder / "state" / STATE).unlink()


def commit_in_place(folder: Path) -> None:
    path = folder / "state" / STATE
    path.write_bytes(path.read_bytes())


def read_state(folder: Path) -> object:
    found = states(folder).read()
    if found is None:
        return None
    progress, values = found
    assert (values["blocks.0.left"] == progress.step).all()
    return progress.step


def read_best(folder: Path) -> object:
    return float(states(folder).best()["blocks.0.left"][0, 0])


# The folder of a training run.


def write_checkpoint(value: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import torch

        from wasi_export.training.resume import CHECKPOINT, Position, save_position

        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, value)
        position = Position(key="k", step=value)
        save_position(folder / CHECKPOINT, position, model, torch.optim.SGD(model.parameters()))

    return write


def read_checkpoint(folder: Path) -> object:
    from wasi_export.training.resume import CHECKPOINT, read_position

    position = read_position(folder / CHECKPOINT)
    if position is None:
        return None
    with safe_open(folder / CHECKPOINT, "np") as file:
        assert (file.get_tensor("model.weight") == position.step).all()
    return position.step


def finish_run(folder: Path) -> None:
    import torch
    from helpers import SPEC

    from wasi_export.run_folder import RunFacts
    from wasi_export.training.checkpoint import save_run

    facts = RunFacts(
        name="tiny", method="dense", classes=("a", "b"), input=SPEC, seed=0, parameters=8, metrics={},
        data_fingerprint=None, key="k", weights_sha256="",
    )  # fmt: skip
    save_run(folder, torch.nn.Linear(3, 2), Config(), facts)


def empty_run(folder: Path) -> None:
    from wasi_export.training.stage import empty_run

    empty_run(folder)


def read_run(folder: Path) -> object:
    """Whether there is a finished run, all of it; else how far the training is."""
    from wasi_export.manifest import CONFIG
    from wasi_export.training.checkpoint import read_facts

    facts = read_facts(folder)
    if facts is None:
        return read_checkpoint(folder)
    assert Config.from_toml(folder / CONFIG) == Config()
    return facts.key


# Single documents.


def write_plan(mode: str) -> Callable[[Path], None]:
    plan = Plan.model_validate({"activation_mode": mode, "layers": ()})
    return lambda folder: write_bytes(folder / "plan.json", plan.model_dump_json(indent=2).encode())


def read_plan(folder: Path) -> object:
    return Plan.load(folder / "plan.json").activation_mode


def write_validation(model: str) -> Callable[[Path], None]:
    from report_inputs import CHECKS, make_report

    return lambda folder: write_report(make_report(*CHECKS, model=model), folder / "report")


def read_validation(folder: Path) -> object:
    return read_report(folder / "report" / "report.json").model


WRITES = {
    "file": Save(write_file(OLD), write_file(NEW), read_file),
    "new file": Save(nothing, write_file(NEW), read_file),
    "folder": Save(write_folder(OLD), write_folder(NEW), read_folder),
    "new folder": Save(nothing, write_folder(NEW), read_folder),
    "folder by two renames": Save(write_folder(OLD), write_by_two_renames, read_brought_back),
    "bundle": Save(write_bundle(OLD), write_bundle(NEW), read_bundle),
    "new bundle": Save(nothing, write_bundle(NEW), read_bundle),
    "first state": Save(nothing, commit(NEW), read_state),
    "state": Save(commit_two, commit(NEW), read_state),
    "damaged state": Save(commit_two_and_damage, commit(NEW), read_state),
    "lost state": Save(commit_two_and_lose, commit(NEW), read_state),
    "best state": Save(commit_two, lambda folder: states(folder).keep_best(tensors(NEW)), read_best),
    "checkpoint": Save(write_checkpoint(OLD), write_checkpoint(NEW), read_checkpoint),
    "finished run": Save(write_checkpoint(OLD), finish_run, read_run),
    "emptied run": Save(finish_run, empty_run, read_run),
    "plan": Save(write_plan("none"), write_plan("feature"), read_plan),
    "report": Save(write_validation("old"), write_validation("new"), read_validation),
}
WRONG = {
    "file in place": Save(write_file(OLD), write_in_place, read_file),
    "folder in place": Save(write_folder(OLD), write_folder_in_place, read_folder),
    "state in place": Save(commit_two, commit_in_place, read_state),
}
"""Which a kill finds out."""
UNSYNCED = {
    "file without sync": Save(write_file(OLD), write_without_sync, read_file),
    "folder without sync": Save(write_folder(OLD), write_folder_without_sync, read_folder),
}
"""Which only a power cut finds out."""
CASES = WRITES | WRONG | UNSYNCED


def found(case: Save, folder: Path) -> object:
    """What the case reads; the error of ours, or of a reader that found what is no artefact, as text."""
    try:
        return case.read(folder)
    except (WasiExportError, SafetensorError, AssertionError, OSError) as error:
        return f"{type(error).__name__}: {error}"
