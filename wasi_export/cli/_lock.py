"""One process at a time in a folder, whatever machine it is on; a process that dies leaves no lock behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wasi_export.errors import UsageError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a folder, which is made, for as long as the context lasts.

    Args:
        folder: what only one process may work in.
        wait: for the process that has the lock; without it its lock is an error.

    Raises:
        UsageError: another process has the lock, or the folder cannot be written.
    """
    from wasi_export._extras import require

    filelock = require("filelock", extra="train")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK, timeout=-1 if wait else 0)
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(
            f"{folder} is in use by another process: wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error}: choose another place") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Returns whether a process works in a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with locked(folder):
            return False
    except UsageError:
        return True
