"""Counts the instructions of a run of each model, in an emulated ARM: no clock, the same on every machine.

    python -m wasi_export.runtimes.instructions MODEL.onnx...

is started over there with the plugin `counter.c` in the emulator. It marks the beginning and the end of one
run by a system call that fails, and the plugin writes what was executed in between.

The totals of two models have about the ratio of their times on a processor that is not short of memory
bandwidth, which a vision transformer at batch 1 is not; a clock is another thing. The estimate of the time on
a Raspberry Pi 5 is a range: a Cortex-A76 begins two vector, two memory and four instructions of any kind in a
cycle, and onnxruntime keeps 70 to 90 % of that up.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

from wasi_export.errors import HostError, WasiExportError
from wasi_export.report import Instructions
from wasi_export.runtimes.cache import cache_folder, made_once
from wasi_export.runtimes.session import Session
from wasi_export.runtimes.targets.arm64 import COUNTER
from wasi_export.runtimes.targets.packages import content_key
from wasi_export.runtimes.targets.target import LocalTarget, Target, output_of

MARK = 0x515700
WARM_UPS = 1
CLOCK_HZ, UNITS, EFFICIENCY = 2.4e9, {"simd": 2, "load_store": 2, "total": 4}, (0.9, 0.7)
ESTIMATED = "arm64:pi5"
COMPILERS = ("cc", "gcc", "clang")


def count_instructions(
    target: Target, models: Sequence[tuple[str, Path]], *, batch: int = 1, seconds: float
) -> tuple[Instructions, ...]:
    """Returns the counts of each (name, ONNX file), in the order given; ratios are to the first.

    Raises:
        HostError: there is no C compiler for the plugin, or it took longer.
        ModelFailedError: a model does not load or fails.
    """
    assert isinstance(target, LocalTarget), "what is emulated is emulated here"
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        plugin = f"{counter_plugin()},out={counts}"
        counted = replace(target, environment={**target.environment, COUNTER: plugin})
        paths = [str(path.resolve()) for _, path in models]
        output_of(counted, ("-m", __name__, str(batch), *paths), seconds=seconds)
        lines = counts.read_text(encoding="ascii").splitlines()
    found = [{key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", line)} for line in lines[1::2]]
    assert len(found) == len(models), "two marks for each model"
    return tuple(
        Instructions(
            model=name,
            batch=batch,
            **counted_,
            ratio_to_first=counted_["total"] / found[0]["total"],
            estimate_ms=estimate_ms(counted_) if target.name == ESTIMATED else None,
        )
        for (name, _), counted_ in zip(models, found, strict=True)
    )


def estimate_ms(counts: dict[str, int]) -> tuple[float, float]:
    """Returns the range of the time on one core of a Raspberry Pi 5 that the counts allow."""
    cycles = max(counts[kind] / width for kind, width in UNITS.items())
    low, high = (1e3 * cycles / CLOCK_HZ / efficiency for efficiency in EFFICIENCY)
    return low, high


def counter_plugin() -> Path:
    """Returns the plugin of the emulator, compiled once.

    Raises:
        HostError: there is no C compiler, or it fails.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise HostError("counting instructions needs a C compiler: install gcc")
    with as_file(files("wasi_export.runtimes.targets") / "counter.c") as source:

        def make(folder: Path) -> None:
            command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(folder / "counter.so")]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode != 0:
                raise HostError(f"{compiler} cannot compile the counter: {ended.stderr.strip()[-200:]}")

        return made_once(cache_folder() / f"counter-{content_key(source)}", make) / "counter.so"


def _run_marked(batch: int, models: Sequence[Path]) -> None:
    for number, path in enumerate(models):
        session = Session.open(path)
        images = session.random_images(batch)
        for _ in range(WARM_UPS):
            session.run(images)
        _mark(2 * number)
        session.run(images)
        _mark(2 * number + 1)


def _mark(number: int) -> None:
    """Makes the system call that the plugin waits for: it asks for the group of a process that is not."""
    with contextlib.suppress(ProcessLookupError):
        os.getpgid(MARK + number)


if __name__ == "__main__":
    try:
        _run_marked(int(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
    except WasiExportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(int(error.exit_code))
