"""What takes long to make and is kept for this user, in a folder of ours."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from wasi_export.errors import HostError


def cache_folder() -> Path:
    """Returns our folder in the user's cache folder.

    Source: XDG Base Directory Specification.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wasi-export"


def made_once(destination: Path, make: Callable[[Path], None]) -> Path:
    """Returns a folder that is made where it is not there yet; whole or not at all.

    Raises:
        HostError: it cannot be written.
    """
    if destination.is_dir():
        return destination
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as staging:
            made = Path(staging) / "made"
            made.mkdir()
            make(made)
            if not destination.is_dir():  # another process may have been faster
                made.rename(destination)
    except OSError as error:
        if not destination.is_dir():
            raise HostError(
                f"cannot write {destination}: {error}: name another folder with XDG_CACHE_HOME"
            ) from error
    return destination
