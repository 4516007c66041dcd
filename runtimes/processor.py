"""What Linux tells of a processor and its board. Nothing here imports onnxruntime."""

import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BOARD = Path("/proc/device-tree/model")

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


def told(path: Path) -> str:
    """Returns what a file of the system says; empty where there is none, or it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def board_name() -> str:
    """Returns the name in the device tree; empty where there is none."""
    return told(BOARD).strip("\0\n ")


def processor_name(cpuinfo: str) -> str:
    """Returns the processor that the text of /proc/cpuinfo describes, or what the platform calls it."""
    if named := re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE):
        return named[1].strip()
    parts = {int(part, 16) for part in re.findall(r"^CPU part\s*:\s*(0x[0-9a-f]+)$", cpuinfo, re.MULTILINE)}
    if parts:
        return ", ".join(ARM_PARTS.get(part, f"ARM part {part:#x}") for part in sorted(parts))
    return platform.processor() or "unknown"


def processor_features(cpuinfo: str) -> tuple[str, ...]:
    """Returns the flags that every processor has in the text of /proc/cpuinfo."""
    lines = re.findall(r"^(?:Features|flags)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return tuple(sorted(set.intersection(*(set(line.split()) for line in lines)))) if lines else ()
