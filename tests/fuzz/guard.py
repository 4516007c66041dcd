"""What a reader has no business with: files outside its folder, programs, connections, pickles.

Python tells an audit hook before it opens a file or starts a program, so nothing of it happens here.
Source: https://docs.python.org/3/library/audit_events.html
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

READABLE = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc", "/sys", "/dev")
"""Where Python and its libraries read: code, and facts of the machine."""
WRITABLE = ("/dev/null",)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = frozenset(
    [
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.remove",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.utime",
        "shutil.rmtree",
        "shutil.move",
        "shutil.copyfile",
    ]
)
_NEVER = frozenset(
    [
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "urllib.Request",
        "pickle.find_class",
    ]
)
_folder: list[str] = []


class ForbiddenError(BaseException):
    """A reader did what it must not do; no `except Exception` holds it up."""


@contextlib.contextmanager
def only_below(folder: Path) -> Iterator[None]:
    """Lets this process change files below a folder alone, which is no link, and start nothing."""
    _folder.append(str(folder))
    try:
        yield
    finally:
        _folder.pop()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _folder:
        return
    if event in _NEVER:
        raise ForbiddenError(f"{event} {arguments[:2]}")
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = arguments
        is_write = bool(mode and set(mode) & set("wax+")) or bool(flags & _WRITES)
        _require_below(event, path, WRITABLE if is_write else READABLE)
    elif event in _CHANGES:
        for path in arguments:
            if isinstance(path, str | bytes | os.PathLike):
                _require_below(event, path, ())


def _require_below(event: str, path: Any, also: tuple[str, ...]) -> None:
    with contextlib.suppress(ValueError):  # a null byte: the system refuses it
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == allowed or real.startswith(f"{allowed}/") for allowed in (*_folder, *also)):
            raise ForbiddenError(f"{event} {real}")


sys.addaudithook(_hook)
