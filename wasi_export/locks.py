"""Locks between processes: files that the system locks, so that a process that dies holds none."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from wasi_export.errors import UsageError

LOCK = ".lock"
"""Name of the lock of a folder, inside of it."""


@contextlib.contextmanager
def held_lock(path: Path, owner: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file, which is made and removed again, for as long as the context lasts.

    Args:
        path: of the lock file; its folder is there.
        owner: what it is the lock of, for the message.
        wait: for the process that has the lock; without it its lock is an error.

    Raises:
        UsageError: another process has the lock.
        OSError: the lock file cannot be written.
    """
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, operation)
            except BlockingIOError:
                raise UsageError(
                    f"{owner} is in use by another process: wait for it, or name another folder"
                ) from None
            if not _is_file_at(file, path):  # whoever had the lock has removed it
                continue
            # A loader's worker, which outlives a killed process by seconds, must not keep its lock.
            os.register_at_fork(after_in_child=file.close)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def is_locked(folder: Path) -> bool:
    """Returns whether a process works in a folder."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _is_file_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
