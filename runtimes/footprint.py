"""What a model costs to load: time, and the peak memory of a process that does nothing else.

`measure_footprint` starts this module as a fresh process. Peak memory is VmHWM of /proc/self/status, which
starts at zero in a new program; `ru_maxrss` would begin with the high-water mark of the parent.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from wasi_export.errors import HostError, ModelFailedError, WasiExportError
from wasi_export.runtimes.session import Session

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Footprint:
    """Wall time to load a model in ms, and peak resident memory of its process in 10^6 bytes."""

    load_ms: float
    peak_rss_mb: float


def measure_footprint(model_path: Path, *, batch: int = 1, threads: int = 1) -> Footprint:
    """Returns what a fresh process needs to load the model and run one batch.

    Raises:
        HostError: this system does not tell the peak memory of a process.
        ModelFailedError: the process failed, or was killed, as it is where memory ends.
    """
    if not STATUS.exists():
        raise HostError(f"peak memory is read from {STATUS}, which this system lacks: measure on Linux")
    command = [sys.executable, "-m", __name__, str(model_path), str(batch), str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode < 0:
        raise ModelFailedError(
            f"loading {model_path} was killed by signal {-child.returncode}: is there enough memory?"
        )
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelFailedError(f"loading {model_path} in a fresh process failed: {last}")
    return Footprint(**json.loads(child.stdout))


def _measure_here(model_path: Path, batch: int, threads: int) -> Footprint:
    start = time.perf_counter_ns()
    session = Session.open(model_path, threads=threads)
    load_ms = (time.perf_counter_ns() - start) / 1e6
    session.run(session.random_images(batch))
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert peak, "Linux has VmHWM in /proc/self/status"
    return Footprint(load_ms, int(peak[1]) * 1024 / 1e6)


if __name__ == "__main__":
    try:
        footprint = _measure_here(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    except WasiExportError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(asdict(footprint)))
