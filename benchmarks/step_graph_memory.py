"""Memory of a process, from the kernel."""

import re
from pathlib import Path


def memory_mib(field: str, process: int | str = "self") -> float:
    """Returns VmRSS or VmHWM of /proc/PROCESS/status in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) / 1024
