"""Memory of this process, from the kernel."""

import re
from pathlib import Path


def memory_mib(field: str) -> float:
    """Returns VmRSS or VmHWM of /proc/self/status in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) / 1024
