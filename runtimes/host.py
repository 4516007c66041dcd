"""What machine this is: the facts without which a latency says nothing."""

import platform
import re
from pathlib import Path

import numpy as np
import onnxruntime
import PIL
import psutil

import wasi_export
from wasi_export.report import Host

# "CPU part" of /proc/cpuinfo for implementer 0x41; Linux arch/arm64/include/asm/cputype.h.
ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD40: "Neoverse-V1",
    0xD49: "Neoverse-N2",
    0xD4F: "Neoverse-V2",
}


def describe_host() -> Host:
    """Returns the board or machine, its processor, cores, memory, system and the versions that matter."""
    return Host(
        machine=_machine(),
        processor=processor_name(_read(Path("/proc/cpuinfo"))),
        cores=psutil.cpu_count() or 1,
        memory_mb=psutil.virtual_memory().total // 10**6,
        system=platform.platform(),
        versions={
            "python": platform.python_version(),
            "wasi-export": wasi_export.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    )


def processor_name(cpuinfo: str) -> str:
    """Returns the processor that the text of /proc/cpuinfo describes, or what the platform calls it."""
    if named := re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE):
        return named[1].strip()
    parts = {int(part, 16) for part in re.findall(r"^CPU part\s*:\s*(0x[0-9a-f]+)$", cpuinfo, re.MULTILINE)}
    if parts:
        return ", ".join(ARM_PARTS.get(part, f"ARM part {part:#x}") for part in sorted(parts))
    return platform.processor() or "unknown"


def _machine() -> str:
    """Returns the architecture, after the name of the board where the device tree has one."""
    board = _read(Path("/proc/device-tree/model")).strip("\0\n ")
    return f"{board}, {platform.machine()}" if board else platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
