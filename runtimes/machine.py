"""What a machine is, as far as running a model depends on it: facts without a judgement, as one document.

Whatever a system does not tell is None or empty. `doctor.py` judges them. Nothing here imports onnxruntime,
which may be what kills a process.
"""

import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from pydantic import Field

import wasi_export
from wasi_export.runtimes.processor import CPUINFO, board_name, processor_features, processor_name, told
from wasi_export.runtimes.vcgencmd import throttled_bits
from wasi_export.settings import Frozen

POLICIES = Path("/sys/devices/system/cpu/cpufreq")
REQUIRED = ("onnxruntime", "numpy", "pillow", "safetensors", "psutil")
CHILD_SECONDS = 120
_IMPORT = "import onnxruntime; print(onnxruntime.__version__)"


class ChildRun(Frozen):
    """How a fresh Python that imported the runtime ended."""

    exit_code: int | None = Field(description="negative: the signal that killed it; None: it hung")
    message: str = Field("", description="last line on stderr")


class MachineFacts(Frozen):
    """A machine and what is installed on it."""

    machine: str = Field(description="architecture of the kernel, as aarch64")
    pointer_bits: int = Field(description="of this Python: 32 on a 64-bit kernel is a 32-bit system")
    board: str = Field(description="of the device tree; empty: there is none")
    processor: str
    features: tuple[str, ...] = Field(description="flags of the processor, as Linux names them")
    cores: int = Field(description="that this process may use")
    memory_mb: int
    available_mb: int
    folder: Path
    disk_mb: int | None = Field(description="free for this user in the folder")
    page_bytes: int | None
    governors: tuple[str, ...] = Field(description="of the processor's clock; empty: not told")
    throttled: int | None = Field(description="bits of `vcgencmd get_throttled`, of a Raspberry Pi")
    libc: str
    python: str
    versions: Mapping[str, str | None] = Field(description="of packages; None: not installed")
    runtime: ChildRun


def gather(folder: Path, *, python: str = sys.executable) -> MachineFacts:
    """Returns the facts of this machine.

    Args:
        folder: whose file system the free space is of.
        python: that imports the runtime, in a process of its own.
    """
    cpuinfo = told(CPUINFO)
    memory = psutil.virtual_memory()
    return MachineFacts(
        machine=platform.machine(),
        pointer_bits=8 * struct.calcsize("P"),
        board=board_name(),
        processor=processor_name(cpuinfo),
        features=processor_features(cpuinfo),
        cores=_usable_cores(),
        memory_mb=memory.total // 10**6,
        available_mb=memory.available // 10**6,
        folder=folder,
        disk_mb=_free_mb(folder),
        page_bytes=os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        governors=tuple(sorted({told(path).strip() for path in POLICIES.glob("*/scaling_governor")})),
        throttled=throttled_bits(),
        libc=" ".join(platform.libc_ver()).strip(),
        python=platform.python_version(),
        versions={"wasi-export": wasi_export.__version__} | {name: _version(name) for name in REQUIRED},
        runtime=_import_runtime(python),
    )


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _free_mb(folder: Path) -> int | None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free // 10**6
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _import_runtime(python: str) -> ChildRun:
    """Imports onnxruntime in a fresh process: where it kills one, it does not kill this one."""
    try:
        child = subprocess.run(
            [python, "-c", _IMPORT], capture_output=True, text=True, check=False, timeout=CHILD_SECONDS
        )
    except subprocess.TimeoutExpired:
        return ChildRun(exit_code=None)
    lines = child.stderr.strip().splitlines()
    return ChildRun(exit_code=child.returncode, message=lines[-1] if lines else "")
