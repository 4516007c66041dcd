"""A board that loses power all the time: what `wasi-export adapt` keeps; its memory; how soon it begins.

    wasi-export run                              # makes runs/digits/bundle, three minutes
    python benchmarks/adapt_kills.py             # half an hour on two cores
    python benchmarks/adapt_kills.py --json      # the result that is there

The bundle is that of the built-in demo, the images are those of its data set, as an .npz.

*kills*: trainings on 400 images, ten epochs of 40 steps of 8 images, each step committed, are killed
(SIGKILL) 500 times in all. Nine of ten kills come up to 0.3 s after the first new commit of a process, the
others up to 1 s after its start, by seed. Before each kill the step in the folder is read, and after it
again: a step is lost where it is lower. A training that ends is compared with one of the same seed that was
never interrupted, tensor for tensor, and the next seed begins.

*memory*: one process takes 10,000 steps with the default options. From the commit of a step on its resident
set (VmRSS) is read 40 times in a second, a commit being in it for some of them: median, and the peak so far.

*start*: a whole process that takes one step, commits it and ends, so a little more than from start to first
commit. In it: Python's start and imports, the check of every hash of the bundle, both graphs loaded, the
accuracy of 80 held-out images before training, saved with the first state (epoch 0), and the step. Wall and
processor time from the system, median and highest of 9.
"""

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from wasi_export.datasets import load_splits
from wasi_export.durable import write_bytes
from wasi_export.runtimes.host import describe_host
from wasi_export.runtimes.state_folder import PREVIOUS, STATE

RESULT = Path("benchmarks/results/adapt_kills.json")
KILLS, IMAGES, EPOCHS = 500, 400, 10
EARLY_SHARE, EARLY_SECONDS, LATE_SECONDS, POLL_SECONDS = 0.1, 1.0, 0.3, 0.004
MEMORY_STEPS, STARTS = (100, 1000, 2000, 5000, 10_000), 9


def main() -> None:
    """Measures what is missing in the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("runs/digits/bundle"))
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--json", action="store_true", help="print the result")
    options = parser.parse_args()
    result: dict[str, Any] = {"protocol": __doc__, "host": describe_host().model_dump(mode="json")}
    if RESULT.exists():
        result = json.loads(RESULT.read_text(encoding="utf-8"))
    if options.json:
        print(json.dumps(result, indent=1))
        return
    with tempfile.TemporaryDirectory() as work:
        images = write_images(Path(work))
        parts = {
            "start": lambda: start(options.bundle, images, Path(work)),
            "kills": lambda: kills(options.bundle, images, Path(work), options.kills),
            "memory": lambda: memory(options.bundle, images, Path(work)),
        }
        for name, measure in parts.items():
            if name not in result:
                result[name] = measure()
                write_bytes(RESULT, json.dumps(result, indent=1).encode() + b"\n")
                print(name, json.dumps(result[name], indent=1), file=sys.stderr)


def write_images(folder: Path) -> Path:
    """Returns an archive of the training images: to read it a process needs no scikit-learn."""
    images = load_splits("digits")[0]
    pixels = np.stack([np.asarray(images[i][0]) for i in range(len(images))])
    np.savez(folder / "digits.npz", images=pixels, labels=images.labels)
    return folder / "digits.npz"


def adapt(bundle: Path, images: Path, state: Path, **options: int) -> list[str]:
    """Returns the command of a training."""
    given = {"data": images, "state": state, **options}
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "wasi_export", "adapt", str(bundle), *flags]


@contextlib.contextmanager
def started(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Gives the process, without output but its errors; killed and waited for at the end."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def committed(folder: Path) -> int:
    """Returns the step in the folder, which another process may be writing; -1 without any."""
    for _ in range(3):  # a commit may rename both files between the two looks
        for name in (STATE, PREVIOUS):
            with contextlib.suppress(OSError, SafetensorError), safe_open(folder / name, "np") as file:
                return int(json.loads(file.metadata()["progress"])["step"])
    return -1


def start(bundle: Path, images: Path, work: Path) -> dict[str, Any]:
    """Returns the times of processes that commit one step and end."""
    wall, cpu, peak = [], [], []
    for index in range(STARTS):
        options = {"commit_every": 1, "max_seconds": 0, "limit": IMAGES}
        command = adapt(bundle, images, work / f"start {index}", **options)
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall.append(time.perf_counter() - began)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert committed(work / f"start {index}") == 1
        cpu.append(used.ru_utime + used.ru_stime)
        peak.append(used.ru_maxrss / 1e3)
    return {"wall_s": sorted(wall), "cpu_s": sorted(cpu), "peak_mb": sorted(peak)}


def kills(bundle: Path, images: Path, work: Path, count: int) -> dict[str, Any]:
    """Returns what was lost in so many kills."""
    chosen = random.Random(0)
    found = {"kills": 0, "before_first_commit": 0, "in_a_commit": 0, "between_the_renames": 0}
    found |= {
        "commits_seen": 0,
        "steps": 0,
        "steps_lost": 0,
        "trainings": 0,
        "ends_compared": 0,
        "ends_equal": 0,
    }
    while found["kills"] < count:
        seed = found["trainings"]
        found["trainings"] += 1
        options = {"limit": IMAGES, "epochs": EPOCHS, "commit_every": 1, "seed": seed}
        state = work / f"killed {seed}"
        while found["kills"] < count and kill_once(
            adapt(bundle, images, state, **options), state, chosen, found
        ):
            pass
        # What is left of the last training runs to its end as well.
        subprocess.run(adapt(bundle, images, state, **options), stdout=subprocess.DEVNULL, check=True)
        found["steps"] += committed(state)
        whole = work / f"whole {seed}"
        subprocess.run(adapt(bundle, images, whole, **options), stdout=subprocess.DEVNULL, check=True)
        found["ends_compared"] += 1
        found["ends_equal"] += same(load_file(state / STATE), load_file(whole / STATE))
        print(json.dumps(found), file=sys.stderr)
    return found


def kill_once(command: list[str], state: Path, chosen: random.Random, found: dict[str, int]) -> bool:
    """Starts a process and kills it, and counts; returns False where it ended before."""
    early = chosen.random() < EARLY_SHARE
    seconds = chosen.uniform(0, EARLY_SECONDS if early else LATE_SECONDS)
    before = seen = committed(state)
    left_before, whole_before = set(state.glob(f".{STATE}.*")), (state / STATE).exists()
    end = time.monotonic() + seconds if early else None
    with started(command) as process:
        while process.poll() is None and (end is None or time.monotonic() < end):
            time.sleep(POLL_SECONDS)
            step = committed(state)
            if step > seen:
                found["commits_seen"] += 1
                seen = step
                if end is None:
                    end = time.monotonic() + seconds
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read() if process.stderr else ""
            return False
        process.kill()
        process.wait()
    found["kills"] += 1
    found["before_first_commit"] += seen == before
    found["in_a_commit"] += not set(state.glob(f".{STATE}.*")) <= left_before
    found["between_the_renames"] += whole_before and not (state / STATE).exists()
    found["steps_lost"] += max(0, seen - committed(state))
    return True


def memory(bundle: Path, images: Path, work: Path) -> dict[str, Any]:
    """Returns the memory of one process after so many steps."""
    found: dict[str, list[float]] = {"step": [], "rss_mb": [], "peak_mb": []}
    epochs = MEMORY_STEPS[-1] // 144 + 2  # of 1,150 images, four fifths of all, 8 a step
    with started(adapt(bundle, images, work / "memory", epochs=epochs)) as process:
        for step in MEMORY_STEPS:
            while (at := committed(work / "memory")) < step:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                time.sleep(0.05)
            readings = []
            for _ in range(40):
                readings.append(status_mb(process.pid, "VmRSS"))
                time.sleep(0.025)
            found["step"].append(at)
            found["rss_mb"].append(float(np.median(readings)))
            found["peak_mb"].append(status_mb(process.pid, "VmHWM"))
    return found


def status_mb(pid: int, field: str) -> float:
    """Returns VmRSS or VmHWM of a process in 10^6 bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024 / 1e6


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    """Returns whether all tensors have the same bits."""
    return ours.keys() == theirs.keys() and all(ours[n].tobytes() == theirs[n].tobytes() for n in ours)


if __name__ == "__main__":
    main()
