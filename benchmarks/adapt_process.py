"""A process of `wasi-export adapt`: how soon it has committed a step, and its memory over 10,000 of them.

    wasi-export run                                # makes runs/digits/bundle, three minutes
    python benchmarks/adapt_process.py             # minutes on two cores
    python benchmarks/adapt_process.py --docs      # table into docs/adapt.md, no run
    python benchmarks/adapt_process.py --json      # prints the result

The bundle is that of the built-in demo, the images are those of its data set, as an .npz. What is left of a
process that is killed: `faults.py`.

*memory*: one process takes 10,000 steps with the default options. From the commit of a step on its resident
set (VmRSS) is read 40 times in a second, a commit being in it for some of them: median, and the peak so far.

*start*: a whole process that takes one step, commits it and ends, so a little more than from start to first
commit. In it: Python's start and imports, the check of every hash of the bundle, both graphs loaded, the
accuracy of 80 held-out images before training, saved with the first state (epoch 0), and the step. Wall and
processor time from the system, of 9 processes.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from kept import new_parser, new_result, read_result, to_json, write_result
from pages import fill
from safetensors import SafetensorError, safe_open
from step_graph_memory import memory_mib

from wasi_export.datasets import load_splits
from wasi_export.runtimes.state_folder import PREVIOUS, STATE
from wasi_export.views import markdown_table

RESULT, PAGE = Path("benchmarks/results/adapt_process.json"), Path("docs/adapt.md")
MARK, END = "<!-- benchmarks/adapt_process.py -->\n", "<!-- end of benchmarks/adapt_process.py -->"
STEPS, SHOWN, STARTS, IMAGES = (100, 1000, 2000, 5000, 10_000), (1000, 10_000), 9, 400
MB = 2**20 / 1e6
"""Of a MiB."""


def main() -> None:
    """Measures what is missing in the result."""
    parser = new_parser(__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("runs/digits/bundle"))
    parser.add_argument("--docs", action="store_true", help="table into the page, no run")
    options = parser.parse_args()
    result = read_result(RESULT, new_result(__doc__))
    if options.json:
        print(to_json(result))
    elif options.docs:
        fill(PAGE, MARK, END, to_markdown(result))
    else:
        with tempfile.TemporaryDirectory() as work:
            images = write_images(Path(work))
            for name, measure in {"start": start, "memory": memory}.items():
                if name not in result:
                    result[name] = measure(options.bundle, images, Path(work))
                    write_result(RESULT, result)


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table of both."""
    resident = dict(zip(STEPS, result["memory"]["rss_mb"], strict=True))
    after = " and after ".join(f"{step:,}" for step in SHOWN)
    wall = result["start"]["wall_s"]
    rows = [
        (f"resident memory after {after} steps, MB", ", ".join(f"{resident[step]:.1f}" for step in SHOWN)),
        (
            f"from start to the first committed step, whole process, median of {len(wall)}, s",
            f"{median(wall):.2f}",
        ),
    ]
    return markdown_table(("a process of `adapt`, demo bundle", ""), "lr", rows)


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


def memory(bundle: Path, images: Path, work: Path) -> dict[str, Any]:
    """Returns the memory of one process after so many steps."""
    found: dict[str, list[float]] = {"step": [], "rss_mb": [], "peak_mb": []}
    epochs = STEPS[-1] // 144 + 2  # of 1,150 images, four fifths of all, 8 a step
    command = adapt(bundle, images, work / "memory", epochs=epochs)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            for step in STEPS:
                while (at := committed(work / "memory")) < step:
                    assert process.poll() is None
                    time.sleep(0.05)
                readings = []
                for _ in range(40):
                    readings.append(memory_mib("VmRSS", process.pid) * MB)
                    time.sleep(0.025)
                found["step"].append(at)
                found["rss_mb"].append(median(readings))
                found["peak_mb"].append(memory_mib("VmHWM", process.pid) * MB)
        finally:
            process.kill()
    return found


if __name__ == "__main__":
    main()
