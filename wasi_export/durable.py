"""Files and folders that appear whole or not at all, through power cuts too; hashes of what they hold.

A file is written beside its place, synced, and renamed; then its folder is synced, and so are folders that
were made for it. A folder is filled beside its place, every file of it synced, and put there by one rename;
where another one is there, by an exchange of the two names, after which the other one is removed. (A file
system without such an exchange takes two renames: for an instant there is neither, and who comes next puts
the old one back.)

What is being written has a name of its own, `.NAME.????????.tmp`, and a lock. What a killed process left has
no lock any more, and is removed when the same file or folder is written again.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wasi_export.errors import ArtifactExistsError, UsageError
from wasi_export.locks import LOCK, held_lock

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room, or raise the limit of a file's size",
    errno.EROFS: "choose another place",
    errno.EIO: "check the disk",
}
"""What to do about errors of a disk, whatever was being done."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def file_sha256(path: Path) -> str:
    """Returns the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Returns a short hash of what the parts print as; the key of a cached stage."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: beside it first, then synced and renamed over it.

    Raises:
        UsageError: it cannot be written; what was there before is still there, or the message says that it
            is not.
    """
    with writing(path), made_folder(path.parent), written_beside(path, data) as file:
        file.replace(path)
        _sync_renamed(path)


def require_new(path: Path, *, force: bool) -> None:
    """Lets a file be written that is not there, or is to be replaced.

    Raises:
        ArtifactExistsError: it exists and `force` is not set.
    """
    if path.exists() and not force:
        raise _exists(path)


@contextlib.contextmanager
def written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """Gives a synced file beside the path, to be renamed over it; removed on any error."""
    _remove_left_over_files(path)
    handle, name = _new_file_beside(path)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # mkstemp's files are its owner's alone
            file.write(data)
            file.flush()
            os.fsync(handle)
            yield Path(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path, *, so: str = "what was there before is still there") -> Iterator[None]:
    """Tells an error of the system in one line about what is being written, and how it is there now.

    Raises:
        UsageError: the system raised an error.
    """
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "choose another place")
        raise UsageError(f"cannot write {path}: {error.strerror or error}: {remedy}; {so}") from error


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Makes a folder and those above it, to last through a power cut; those still empty go on any error."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_folder(folder.parent)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _sync_renamed(path: Path) -> None:
    """Makes the new name of what is written last through a power cut.

    Raises:
        UsageError: the system raised an error.
    """
    with writing(path, so="the new one is there, and a power cut may bring the old one back"):
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a folder, which is made, for as long as the context lasts.

    Args:
        folder: what only one process may work in.
        wait: for the process that has the lock; without it its lock is an error.

    Raises:
        UsageError: another process has the lock, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with writing(folder):
            stack.enter_context(made_folder(folder))
            stack.enter_context(held_lock(folder / LOCK, folder, wait=wait))
        yield


def require_replaceable(destination: Path) -> None:
    """Lets folders pass that another can take the place of.

    Raises:
        UsageError: it is the current folder or one above it.
    """
    if destination.resolve() in (here := Path.cwd(), *here.parents):
        raise UsageError(
            f"{destination} holds the current folder, which cannot be replaced: name a new folder"
        )


@contextlib.contextmanager
def staged_folder(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside the destination, put in its place at the end; removed on any error.

    What was there before stays until the new folder is whole, and on the disk.

    Raises:
        ArtifactExistsError: the destination exists and is not empty, and `force` is not set.
        UsageError: the destination is the current folder or one above it, cannot be written, or is being
            written by another process.
    """
    require_replaceable(destination)
    lock = destination.with_name(f".{destination.name}{LOCK}")
    with contextlib.ExitStack() as stack:
        with writing(destination):
            stack.enter_context(made_folder(destination.parent))
            stack.enter_context(held_lock(lock, destination))
            _bring_back(destination)
        if not force and _holds_something(destination):
            raise _exists(destination)
        with writing(destination):
            staging = Path(
                tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}.", suffix=".tmp")
            )
            stack.callback(_remove, staging)  # which is the old folder after an exchange
            staging.chmod(0o755)
        try:
            yield staging
        except OSError as error:
            if error.errno not in REMEDIES:
                raise
            with writing(destination):
                raise
        with writing(destination):
            _sync_tree(staging)
            _put(staging, destination)
            _sync_renamed(destination)


def _exists(path: Path) -> ArtifactExistsError:
    return ArtifactExistsError(f"{path} exists: choose another name or give --force")


def _sync_tree(folder: Path) -> None:
    """Syncs all files and folders below a folder, whoever wrote them, and the folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with Path(parent, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def _put(new: Path, destination: Path) -> None:
    """Renames a folder to the destination; what is there gets the other name or, if it is empty, is gone."""
    if not _holds_something(destination):
        new.replace(destination)
    elif not _exchange(new, destination):
        old = new.with_suffix(".old")
        destination.rename(old)
        try:
            new.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        sync_folder(destination.parent)
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; returns False where the system cannot.

    Source: renameat2(2), RENAME_EXCHANGE.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _bring_back(destination: Path) -> None:
    """Puts back what a process was killed while replacing; removes what killed ones left. Needs the lock."""
    for old in _beside(destination, "old"):
        if destination.exists():
            _remove(old)
        else:
            old.rename(destination)
    for staging in _beside(destination, "tmp"):
        if staging.is_dir():
            _remove(staging)


def _new_file_beside(path: Path) -> tuple[int, str]:
    """Returns an open file that is locked, and its name."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with contextlib.suppress(OSError):  # a file system without locks: what is left over stays
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # another process took it for left over, before it was locked


def _remove_left_over_files(path: Path) -> None:
    """Removes what killed processes left of writing a file: what nobody has locked."""
    for left in _beside(path, "tmp"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _beside(path: Path, suffix: str) -> list[Path]:
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.????????.{suffix}"))


def _holds_something(path: Path) -> bool:
    """Returns whether there is a file, or a folder that is not empty."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there; what cannot be removed is left for the next one."""
    with contextlib.suppress(OSError):
        path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
