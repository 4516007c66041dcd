"""Kills train, export and adapt, two thousand times, and looks for what was lost.

    python benchmarks/faults.py                  # an hour or two on one core; goes on where it was stopped
    python benchmarks/faults.py --docs           # writes docs/faults.md from the result that is there
    python benchmarks/faults.py --json           # prints it

Each process is a fork of one that has imported everything: it runs the same command as `wasi-export` does,
and spares the seconds of the imports. Folders are in memory, a kill being the same there. By seed, one half
of the processes are killed (SIGKILL) at a random time in the first eighth of what the whole training takes,
or in all that an export takes; the other half up to 0.1 s (train) or 0.05 s after the first step that they
saved, or after the last file of a bundle was begun. All work on 80 digits of scikit-learn as PNG files, with
a ViT of 96 channels and two blocks.

*train*: runs of thirty epochs of two steps, saved after every epoch; every second run is low-rank, in two
parts with a factorisation between them. *export*: a dense run, a low-rank one, and now and then one with the
training graph, in turns into the same folder, with SOURCE_DATE_EPOCH. *adapt*: ten epochs of sixteen steps,
each step saved.

While a process runs, and after it was killed, its folder is read as the command reads it that goes on: a
state of a training, or a bundle with the hashes of all its files. A kill is *unreadable* where this is an
error, or a bundle is neither the old nor the new one. A step is *lost* where what is read is lower than what
was read before, or a bundle that was the new one is the old one. What *ended* by itself is compared with the
same that nobody interrupted: the weights of a run, the tensors of a board's state, every file of a bundle.
Whatever else is in the folder then was *left over*.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kept import new_parser, new_result, read_result, to_json, write_result
from pages import fill
from safetensors.numpy import load_file

from wasi_export.artifact import Bundle
from wasi_export.cli import main as run_command
from wasi_export.datasets import load_splits
from wasi_export.durable import file_sha256
from wasi_export.errors import WasiExportError
from wasi_export.manifest import MANIFEST
from wasi_export.run_folder import WEIGHTS
from wasi_export.runtimes.adapt import AdaptProgress
from wasi_export.runtimes.state_folder import STATE, StateFolder
from wasi_export.training.checkpoint import read_facts
from wasi_export.training.resume import CHECKPOINT, read_position
from wasi_export.views import markdown_table

RESULT, PAGE = Path("benchmarks/results/faults.json"), Path("docs/faults.md")
MARK, END = "<!-- kills -->\n", "<!-- /kills -->"
KILLS = {"train": 600, "export": 400, "adapt": 1000}
COUNTS = ("kills", "rounds", "in_a_write", "steps", "unreadable", "lost", "ended", "equal", "left_over")
POLL_SECONDS, LAST_SECONDS = 0.01, {"train": 0.1, "export": 0.05, "adapt": 0.05}
MEMORY = Path("/dev/shm")
FINISHED = 10**6
"""Step of a run that is finished."""

CONFIG = """
name = "tiny"
[model]
name = "vit_tiny_patch16_224"
img_size = 16
in_chans = 1
kwargs = {{ embed_dim = 96, depth = 2, num_heads = 3, patch_size = 4 }}
[data]
source = "{images}"
train_images = 8
val_images = 4
batch_size = 4
[subspace]
fraction = 0.6
calibration_images = 16
[train.dense]
epochs = 30
[train.subspace]
epochs = 30
[export]
train_graph = true
golden_images = 4
[adapt]
epochs = 10
batch_size = 4
"""


@dataclass(frozen=True)
class Work:
    """A command that writes below a folder of its own, and how to look at what it has done."""

    arguments: list[str]
    folder: Path
    step: Callable[[], int]
    """Returns the step that is saved; -1 without any. Raises what the command raises that goes on."""
    result: Callable[[], Any]
    """Returns what it ends with."""
    is_ending: Callable[[], bool] = lambda: False
    """Returns whether it is about to end, where no step tells."""
    share: float = 1 / 8
    """Of the time that all of it takes: until then it is killed."""


class UnreadableError(Exception):
    """A bundle is neither the old nor the new one."""


def main() -> None:
    """Kills what is missing in the result."""
    parser = new_parser(__doc__)
    parser.add_argument("--docs", action="store_true", help="write the page from the result")
    options = parser.parse_args()
    result = read_result(RESULT, new_result(__doc__))
    if options.json:
        print(to_json(result))
    elif options.docs:
        fill(PAGE, MARK, END, to_markdown(result))
    else:
        os.environ |= {"SOURCE_DATE_EPOCH": "1700000000", "OMP_NUM_THREADS": "1"}
        import_all()
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as work:
            measure(result, Path(work))


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table of what was killed and what was lost."""
    columns = {
        "kills": "kills", "of them while a file was written": "in_a_write", "unreadable": "unreadable",
        "steps lost": "lost", "ended": "ended", "with the same bits": "equal", "files left over": "left_over",
    }  # fmt: skip
    rows = [(f"`{name}`", *(f"{result[name][column]:,}" for column in columns.values())) for name in KILLS]
    return markdown_table(("command", *columns), "l" + "r" * len(columns), rows)


def measure(result: dict[str, Any], work: Path) -> None:
    """Kills every command as often as it is to be, in place, and saves after every one that ended."""
    config = work / "config.toml"
    config.write_text(CONFIG.format(images=write_images(work / "images")))
    for name, rounds in (("train", trainings), ("export", exports), ("adapt", adaptations)):
        found = result.setdefault(name, dict.fromkeys(COUNTS, 0))
        for index, (killed, whole) in enumerate(rounds(config, work)):
            if found["kills"] >= KILLS[name]:
                break
            if index >= found["rounds"]:
                kill_until_it_ends(killed, whole, found, random.Random(f"{name} {index}"))
                found["rounds"] += 1
                write_result(RESULT, result)
                print(name, json.dumps(found), file=sys.stderr)


def trainings(config: Path, work: Path) -> Iterator[tuple[Work, Work]]:
    """Yields trainings that are to be killed, each with the same one that is not."""

    def training(seed: int, folder: Path) -> Work:
        def step() -> int:
            if read_facts(folder):
                return FINISHED
            position = read_position(folder / CHECKPOINT)
            return position.step if position else -1

        arguments = train(config, ("dense", "subspace")[seed % 2], folder, f"seed={seed}")
        return Work(arguments, folder, step, lambda: file_sha256(folder / WEIGHTS))

    for seed in itertools.count():
        yield training(seed, work / f"run {seed}"), training(seed, work / f"whole run {seed}")


def exports(config: Path, work: Path) -> Iterator[tuple[Work, Work]]:
    """Yields exports into one folder, of three runs in turns."""
    no_step = "export.train_graph=false"
    for arguments in (
        train(config, "dense", work / "dense", no_step),
        train(config, "subspace", work / "low-rank", no_step),
        train(config, "subspace", work / "learning"),
    ):
        call(arguments)
    for name in itertools.cycle(("dense", "low-rank") * 10 + ("learning",)):
        new = work / f"exported {name}"

        def export(folder: Path, name: str = name, new: Path = new) -> Work:
            bundle = folder / "bundle"

            def step() -> int:
                if not bundle.exists():
                    return -1
                digest = file_sha256(Bundle.open(bundle).path / MANIFEST)
                known = {file_sha256(path): path for path in work.glob(f"exported */bundle/{MANIFEST}")}
                if digest not in known:
                    raise UnreadableError(digest)
                return int(known[digest].is_relative_to(new))

            def files() -> dict[str, str]:
                found = (path for path in bundle.rglob("*") if path.is_file())
                return {path.relative_to(bundle).as_posix(): file_sha256(path) for path in found}

            def is_ending() -> bool:
                return any(folder.glob(".bundle.*.tmp/config.toml"))

            arguments = ["export", str(work / name), "-o", str(bundle), "--force"]
            return Work(arguments, folder, step, files, is_ending, share=1.0)

        yield export(work / "killed exports"), export(new)


def adaptations(config: Path, work: Path) -> Iterator[tuple[Work, Work]]:
    """Yields trainings on the board."""
    bundle = work / "learning bundle"
    call(train(config, "subspace", work / "another"))
    call(["export", str(work / "another"), "-o", str(bundle)])
    owner = Bundle.open(bundle).training_identity

    def adaptation(seed: int, folder: Path) -> Work:
        def step() -> int:
            found = StateFolder(folder, AdaptProgress, owner).read()
            return found[0].step if found else -1

        def tensors() -> dict[str, bytes]:  # the header has the seconds that it took
            return {name: value.tobytes() for name, value in load_file(folder / STATE).items()}

        arguments = ["adapt", str(bundle), "--data", str(work / "images"), "--state", str(folder)]
        return Work([*arguments, "--commit-every", "1", "--seed", str(seed)], folder, step, tensors)

    for seed in itertools.count():
        yield adaptation(seed, work / f"state {seed}"), adaptation(seed, work / f"whole state {seed}")


def train(config: Path, method: str, folder: Path, *overrides: str) -> list[str]:
    """Returns the arguments of a training."""
    settings = [word for override in overrides for word in ("-s", override)]
    return ["train", str(config), "--method", method, "-o", str(folder), *settings]


def kill_until_it_ends(killed: Work, whole: Work, found: dict[str, int], chosen: random.Random) -> None:
    """Starts and kills a command until one of its processes ends by itself, and counts what is found."""
    longest = seconds_of(tuple(whole.arguments))
    while kill_once(killed, found, chosen, longest):
        pass
    found["ended"] += 1
    found["equal"] += killed.result() == whole.result()
    found["left_over"] += len(left_over(killed.folder))


def kill_once(work: Work, found: dict[str, int], chosen: random.Random, longest: float) -> bool:
    """Starts a process and kills it, and counts; returns False where it ended before."""
    anywhere = chosen.random() < 0.5
    last = LAST_SECONDS[work.arguments[0]]
    seconds = chosen.uniform(0, longest * work.share if anywhere else last)
    before = seen = work.step()
    left_before = left_over(work.folder)
    child = fork(work.arguments)
    end = time.monotonic() + seconds if anywhere else None
    while end is None or time.monotonic() < end:
        if ended(child, os.WNOHANG):
            return False
        time.sleep(POLL_SECONDS)
        with contextlib.suppress(WasiExportError, UnreadableError, OSError):  # it is being replaced
            seen = max(seen, work.step())
        if end is None and (seen > before or work.is_ending()):
            end = time.monotonic() + seconds
    os.kill(child, signal.SIGKILL)
    if ended(child):
        return False
    found["kills"] += 1
    found["in_a_write"] += any(path.suffix != ".lock" for path in left_over(work.folder) - left_before)
    try:
        step = work.step()
    except (WasiExportError, UnreadableError) as error:
        print(error, file=sys.stderr)
        found["unreadable"] += 1
        return True
    found["steps"] += step > before
    found["lost"] += step < seen
    return True


def left_over(folder: Path) -> set[Path]:
    """Returns what is in a folder that only a process that writes has there."""
    return {path for pattern in (".*.tmp", ".*.old", "*.lock") for path in folder.rglob(pattern)}


@functools.cache
def seconds_of(arguments: tuple[str, ...]) -> float:
    """Runs a command to its end, once, and returns how long it took."""
    began = time.monotonic()
    call(list(arguments))
    return time.monotonic() - began


def call(arguments: list[str]) -> None:
    """Runs a command to its end."""
    assert ended(fork(arguments))


def fork(arguments: list[str]) -> int:
    """Returns the number of a process that runs a command."""
    child = os.fork()
    if child == 0:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        sys.argv = ["wasi-export", *arguments]
        try:
            run_command()
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        finally:
            os._exit(1)
    return child


def ended(child: int, options: int = 0) -> bool:
    """Waits for a process; returns whether it ended by itself, and well.

    Raises:
        RuntimeError: it failed.
    """
    found, status = os.waitpid(child, options)
    if found == 0 or status == signal.SIGKILL:
        return False
    if status:
        raise RuntimeError(f"a command failed with exit code {os.waitstatus_to_exitcode(status)}")
    return True


def import_all() -> None:
    """Imports what the commands import, and starts no thread: a fork would lack it."""
    for module in (
        "sklearn.datasets", "torch.onnx", "wasi_export.cli._bundle", "wasi_export.runtimes.adapt",
        "wasi_export.runtimes.adapter", "wasi_export.training.stage",
    ):  # fmt: skip
        importlib.import_module(module)


def write_images(folder: Path) -> Path:
    """Returns a folder of digits by class."""
    images = load_splits("digits")[0]
    for index in range(80):
        image, label = images[index]
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(folder / str(label) / f"{index}.png")
    return folder


if __name__ == "__main__":
    main()
