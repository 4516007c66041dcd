"""What the machine does to commands: a full or broken disk, a second process, no memory, images that go away.

Every fault is one line and an exit code, loses nothing that was there, and is over when its reason is.
"""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from report_inputs import make_run
from typer.testing import CliRunner, Result

from wasi_export.cli import app
from wasi_export.cli._machine_faults import machine_faults
from wasi_export.config import Config
from wasi_export.durable import locked_folder, staged_folder
from wasi_export.errors import DataError, HostError
from wasi_export.locks import LOCK
from wasi_export.run_folder import WEIGHTS
from wasi_export.runtimes.session import Session
from wasi_export.training.resume import CHECKPOINT, read_position
from wasi_export.training.stage import train_run

SETTINGS = {
    "name": "tiny",
    "model": {
        "name": "vit_tiny_patch16_224", "img_size": 8, "in_chans": 1,
        "kwargs": {"embed_dim": 64, "depth": 1, "num_heads": 2, "patch_size": 4},
    },
    "data": {"batch_size": 8, "augment": False},
    "train": {"dense": {"epochs": 2}},
    "export": {"golden_images": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty grey images in two classes."""
    folder = tmp_path_factory.mktemp("images")
    for label, level in (("dark", 50), ("light", 200)):
        (folder / label).mkdir()
        for index in range(10):
            Image.new("L", (8, 8), level + index).save(folder / label / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def config(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config.from_mapping(SETTINGS, [f"data.source={images}"])


@pytest.fixture(scope="module")
def run_dir(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be read only."""
    train_run(config, "dense", folder := tmp_path_factory.mktemp("runs") / "tiny")
    return folder


@pytest.fixture(scope="module")
def work(
    config: Config,
    run_dir: Path,
    images: Path,
    learning_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[str]]:
    """What each command is called with, but for where it writes."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config.toml").write_text(config.to_toml())
    plain = ("method=plain", "sensitivity=none", "rank=16", "calibration_images=4")
    quick = [word for setting in plain for word in ("-s", f"subspace.{setting}")]
    return {
        "train": ["train", str(folder / "config.toml"), "-o"],
        "export": ["export", str(run_dir), "--force", "-o"],
        "adapt": ["adapt", str(learning_bundle), "--data", str(images), "--epochs", "1", "--state"],
        "report": ["report", str(make_run(folder / "run")), "--force", "-o"],
        "plan": ["plan", str(folder / "config.toml"), "--force", *quick, "-o"],
    }


COMMANDS = ("train", "export", "adapt", "report", "plan")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(result: Result, code: int, message: str) -> None:
    assert result.exit_code == code, result.output
    line = result.stderr.splitlines()[-1]
    assert re.match(f"error: .*{message}", line), line
    assert "Traceback" not in result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """To a write a limit of a file's size is what a full disk is: an error in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def broken_disk() -> Iterator[None]:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


@contextlib.contextmanager
def read_only_disk() -> Iterator[None]:
    """Refuses what makes a file or a folder, as the system does (a mode would not stop the superuser)."""
    make, opened = os.mkdir, os.open

    def refuse(path: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", lambda path, *args, **kw: refuse(path) if make else None)
        patch.setattr(
            os,
            "open",
            lambda path, flags, *args, **kw: (
                refuse(path) if flags & os.O_CREAT else opened(path, flags, *args, **kw)
            ),
        )
        yield


FAULTS = {
    "full": (full_disk, "File too large: make room"),
    "broken": (broken_disk, "Input/output error: check the disk"),
    "read-only": (read_only_disk, "Read-only file system: choose another place"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "fault"),
    [(command, fault) for command in COMMANDS for fault in FAULTS if command != "plan" or fault == "full"],
)
def test_a_disk_that_cannot_be_written_loses_nothing_and_is_one_line(
    work: dict[str, list[str]], tmp_path: Path, command: str, fault: str
) -> None:
    break_disk, message = FAULTS[fault]
    new = tmp_path / "new" / "result.html"
    with break_disk():
        refused(call(*work[command], new), 2, f"cannot write .*{message}")
    assert not any(tmp_path.iterdir())
    old = tmp_path / "old.html"
    if command in ("train", "adapt"):  # they go on with what is there
        return
    assert call(*work[command], old).exit_code == 0
    before = contents(tmp_path)
    with break_disk():
        refused(call(*work[command], old), 2, f"cannot write .*{message}")
    assert contents(tmp_path) == before
    assert call(*work[command], new).exit_code == 0  # there is room again


@pytest.mark.slow
def test_a_failed_export_leaves_no_folder_of_bundles(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(call("export", run_dir, "-s", "thresholds.max_parity_error=1e-30"), 1, "")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_training_on_the_board_that_finds_the_disk_full_goes_on_from_its_state(
    work: dict[str, list[str]], tmp_path: Path, fault: str
) -> None:
    break_disk, message = FAULTS[fault]
    state, whole = tmp_path / "state", tmp_path / "whole"
    assert call(*work["adapt"], whole).exit_code == 0
    assert call(*work["adapt"], state, "--max-seconds", 0).exit_code == 0
    before = contents(state)
    with break_disk():
        refused(call(*work["adapt"], state), 2, f"cannot write .*{message}")
    assert contents(state) == before
    assert call(*work["adapt"], state).exit_code == 0
    assert tensors(state) == tensors(whole)


def tensors(state: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: tensor.tobytes() for name, tensor in load_file(state / "state.safetensors").items()}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_go_away_end_a_training_that_goes_on_when_they_are_back(
    config: Config, images: Path, tmp_path: Path, workers: int
) -> None:
    here = Path(shutil.copytree(images, tmp_path / "images"))
    config = Config.from_mapping(
        config.model_dump(), [f"data.source={here}", f"data.workers={workers}", "train.dense.epochs=3"]
    )
    train_run(config, "dense", tmp_path / "whole")
    with pytest.raises(
        DataError, match=r"\.png is gone: bring the images back; stopped at epoch 2, .*goes on$"
    ) as caught:
        train_run(config, "dense", tmp_path / "run", on_epoch=lambda _: here.rename(tmp_path / "away"))
    assert "Traceback" not in str(caught.value)
    position = read_position(tmp_path / "run" / CHECKPOINT)
    assert position is not None
    assert position.epoch == 1
    (tmp_path / "away").rename(here)
    train_run(config, "dense", tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_images_that_cannot_be_read_are_counted_where_a_model_is_trained_and_judged(
    work: dict[str, list[str]],
    config: Config,
    run_dir: Path,
    images: Path,
    finished_bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = Path(shutil.copytree(images, tmp_path / "images"))
    (here / "dark" / "broken.png").touch()
    trained = call(*work["train"], tmp_path / "run", "-s", f"data.source={here}", "--json")
    assert json.loads(trained.stdout)["metrics"]["unreadable_images"] == 1
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (run_dir / WEIGHTS).read_bytes()
    judged = call("validate", finished_bundle, "--data", here, "--json")
    (check,) = [c for c in json.loads(judged.stdout)["checks"] if c["name"] == "images left out"]
    assert (check["status"], check["value"]) == ("info", 1)
    assert check["detail"] == "cannot be read: dark/broken.png"
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("command", ["train", "run", "export", "merge", "adapt"])
def test_a_folder_in_use_is_one_line_and_a_lock_of_a_dead_process_is_none(
    work: dict[str, list[str]], learning_bundle: Path, tmp_path: Path, command: str
) -> None:
    state = tmp_path / "state"
    call(*work["adapt"], state, "--max-seconds", 0)
    arguments = work | {
        "run": ["run", work["train"][1], "-o"],
        "merge": ["merge", str(learning_bundle), str(state), "-o"],
    }
    held = staged_folder if command in ("export", "merge") else locked_folder
    out = tmp_path / "out"
    with held(out):
        refused(call(*arguments[command], out), 2, "out is in use by another process: wait for it")
    if command in ("export", "adapt"):
        left = tmp_path / f".out{LOCK}" if command == "export" else out / LOCK
        left.parent.mkdir(exist_ok=True)
        left.touch()
        assert call(*arguments[command], out).exit_code == 0
        assert not left.exists()


@pytest.mark.slow
def test_sigterm_ends_an_export_as_ctrl_c_does(work: dict[str, list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wasi_export", *work["export"], str(tmp_path / "bundles" / "b")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("bundles/.b.*.tmp/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1].splitlines()[-1] == "error: interrupted"
    assert process.returncode == 130
    assert not any(tmp_path.iterdir())


def torch_takes_too_much(folder: Path) -> None:
    torch.empty(2**55)


def numpy_takes_too_much(folder: Path) -> None:
    np.empty(2**55)


def onnxruntime_takes_too_much(folder: Path) -> None:
    """Runs a model that makes 2^50 numbers of one image."""
    nodes = [
        helper.make_node("Shape", ["images"], ["shape"]),
        helper.make_node("Mul", ["shape", "large"], ["larger"]),
        helper.make_node("ConstantOfShape", ["larger"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 1, 1, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [helper.make_tensor("large", TensorProto.INT64, [4], [2**20, 2**20, 2**10, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "large.onnx")
    Session.open(folder / "large.onnx", optimise=False).run(np.zeros((1, 1, 1, 1), np.float32))


@pytest.mark.parametrize("take", [torch_takes_too_much, numpy_takes_too_much, onnxruntime_takes_too_much])
def test_no_memory_is_told_whoever_wants_it(take: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"memory is used up \(.*\): take smaller batches"), machine_faults():
        take(tmp_path)


@pytest.mark.slow
def test_a_training_without_memory_is_one_line(work: dict[str, list[str]], tmp_path: Path) -> None:
    code = (
        "import resource, sys, psutil, wasi_export.training.stage\n"
        "from wasi_export.cli import main\n"
        "limit = psutil.Process().memory_info().vms + 300_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "main()"
    )
    large = ["-s", "model.kwargs.embed_dim=4096", "-s", "model.kwargs.depth=2"]
    command = [sys.executable, "-c", code, *work["train"], str(tmp_path / "run"), *large]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: memory is used up \(.*\): take smaller batches", line)


def test_a_clock_that_goes_back_changes_nothing(
    work: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, whole = tmp_path / "state", tmp_path / "whole"
    assert call(*work["adapt"], whole).exit_code == 0
    assert call(*work["adapt"], state, "--max-seconds", 0).exit_code == 0
    for number, path in enumerate(sorted(state.iterdir())):
        os.utime(path, (10**9 * number, 10**9 * number))
    now = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(now))
    monkeypatch.setattr(time, "time_ns", lambda: 10**9 * next(now))
    assert call(*work["adapt"], state).exit_code == 0
    assert tensors(state) == tensors(whole)
