"""Kills a save before every call that changes a file or a folder, and reads what is there then.

    python kill_points.py CASE...

prints a JSON object with a list for each case of `save_cases.py`, of [function, what is found after a kill
before it, what is found once the save was done again, names of left-over files then]. The last function is
"", where the save ended by itself. The first row is what is there before any. The process that saves is a
fork, and the folders are in memory where the system has such a place, so that a hundred take a second or two:
that a sync comes in time is for `power_cut.py`.
"""

import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from save_cases import CASES, Save, found

CHANGES = frozenset(
    [
        "open",
        "write",
        "flush",
        "close",
        "fsync",
        "truncate",
        "fchmod",
        "chmod",
        "sendfile",
        "mkdir",
        "rename",
        "replace",
        "unlink",
        "rmdir",
        "_exit",
    ]
)
FILES = (io.FileIO, io.BufferedWriter, io.TextIOWrapper)
MEMORY = Path("/dev/shm")


def on_changes(act: Callable[[str], None] | None) -> None:
    """Calls `act` with the name of every function that changes a file, before it is called; None: no more."""

    def profile(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            is_file = isinstance(getattr(function, "__self__", None), FILES)
            if (is_file or function.__module__ == "posix") and function.__name__ in CHANGES:
                act(function.__name__)

    sys.setprofile(profile if act else None)


def killed_at(call: int, case: Save, folder: Path) -> str:
    """Saves in a child that is killed before its call of this number; returns its name, "" at the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        left = call

        def count(name: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.write(writer, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)

        on_changes(count)
        case.write(folder)
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reader, "rb") as pipe:
        name = pipe.read().decode()
    assert status == (signal.SIGKILL if name else 0)
    return name


def kills(case: Save, work: Path) -> Iterator[tuple[str, object, object, list[str]]]:
    """Yields what `kill_points.py` prints."""
    (work / "before").mkdir(parents=True)
    case.before(work / "before")
    yield "before", found(case, work / "before"), None, []
    call, name = 0, None
    while name != "":
        call += 1
        folder = shutil.copytree(work / "before", work / str(call))
        name = killed_at(call, case, folder)
        after = found(case, folder)
        case.write(folder)
        left = sorted(path.name for path in folder.rglob(".*"))
        yield name, after, found(case, folder), left
        shutil.rmtree(folder)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as work:
        results = {name: list(kills(CASES[name], Path(work) / name)) for name in sys.argv[1:]}
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
