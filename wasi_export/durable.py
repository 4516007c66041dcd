"""Files and folders that appear whole or not at all, through power cuts too; hashes of what they hold."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wasi_export.errors import ArtifactExistsError, UsageError


def file_sha256(path: Path) -> str:
    """Returns the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Returns a short hash of what the parts print as; the key of a cached stage."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: beside it first, then synced and renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # mkstemp's files are its owner's alone
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
        sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes what was renamed in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def staged_folder(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside the destination, renamed to it at the end; removed on any error.

    What was there before stays until the new folder is whole.

    Raises:
        ArtifactExistsError: the destination exists and is not empty, and `force` is not set.
        UsageError: the destination is the current folder or one above it, or cannot be written.
    """
    if destination.resolve() in (here := Path.cwd(), *here.parents):
        raise UsageError(
            f"{destination} holds the current folder, which cannot be replaced: name a new folder"
        )
    if destination.exists() and not force and (destination.is_file() or any(destination.iterdir())):
        raise ArtifactExistsError(f"{destination} exists: choose another name or give --force")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    except OSError as error:
        raise UsageError(f"cannot write {destination}: {error}: choose another place") from error
    old = staging.with_name(f"{staging.name}.old")
    staging.chmod(0o755)
    try:
        yield staging
        if destination.exists():
            destination.rename(old)
        staging.replace(destination)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not destination.exists():
            old.rename(destination)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)
