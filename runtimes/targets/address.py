"""What `--target` names."""

from collections.abc import Sequence

from wasi_export.errors import UsageError
from wasi_export.runtimes.targets.arm64 import BOARDS, open_arm64
from wasi_export.runtimes.targets.connection import Address
from wasi_export.runtimes.targets.ssh import SshTarget
from wasi_export.runtimes.targets.target import Target

EXAMPLES: Sequence[str] = (*(f"arm64:{name}" for name in BOARDS), "ssh://[user@]host[:port][/folder]")


def open_target(text: str) -> Target:
    """Returns the machine that `arm64`, `arm64:pi4` or `ssh://[user@]host[:port][/folder]` names.

    Raises:
        UsageError: it names none.
        HostError: it cannot be had.
    """
    kind, _, board = text.partition(":")
    if kind == "arm64":
        return open_arm64(board or "pi5")
    if kind == "ssh":
        return SshTarget(Address.parse(text))
    raise UsageError(f"no target {text!r}: give arm64, {', '.join(EXAMPLES)}")
