"""What Linux tells of a processor in /proc/cpuinfo."""

import platform
import re

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
