"""Files of images: how one is read, and which of many cannot be.

Of thousands of files a few are often cut off or empty. They are looked for before anything is computed, so
that what is trained or judged on is known, and the same whenever the work begins or goes on. What could be
read then and no longer can is another fault, of the disk or of who removed it, and ends the work.
"""

import contextlib
import functools
import logging
import os
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from wasi_export.errors import DataError
from wasi_export.progress import Track, silent

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")  # Pillow goes by content: EPS runs Ghostscript
MAX_UNREADABLE = 0.1
"""Share of files that cannot be read above which something else is wrong."""
NAMES_TOLD = 10
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_NOT_AN_IMAGE = (OSError, EOFError, ValueError, SyntaxError, *_BOMBS)
_log = logging.getLogger(__name__)
_looked_at: dict[tuple[Path, tuple[tuple[Path, int, int], ...]], Mapping[str, str]] = {}
"""What was found below a folder, of files of these sizes and times."""


def read_image(path: Path) -> Image.Image:
    """Returns the decoded image of a file.

    Raises:
        DataError: the file is gone, is not an image, or has more pixels than Pillow's MAX_IMAGE_PIXELS.
    """
    try:
        with _bombs_are_errors(), Image.open(path, formats=FORMATS) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise DataError(f"{path} is gone: bring the images back") from error
    except _NOT_AN_IMAGE as error:
        raise DataError(f"{path} is not an image that can be read ({error}): remove it or mend it") from error


def image_files(folder: Path) -> list[Path]:
    """Returns files called images below a folder, sorted; a hidden one, as `._0.jpg` of a Mac, is none."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and not _is_hidden(path.relative_to(folder)) and _may_be_file(path)
    ]


def unreadable(
    folder: Path, files: Sequence[Path], *, most: float = MAX_UNREADABLE, track: Track = silent
) -> Mapping[str, str]:
    """Returns by name which of the image files of a folder cannot be read, and why; logs a warning of them.

    Every file is decoded, a JPEG at an eighth of its size, in a thread for each processor; once in a process.
    On one core a JPEG of 500x375 takes 0.7 ms and one of 4000x3000 35 ms: many of them are minutes, of which
    `track` tells.

    Raises:
        DataError: their share is more than `most`.
    """
    asked = folder, tuple((path, *_version(path)) for path in files)
    if (found := _looked_at.get(asked)) is None:
        found = _looked_at[asked] = _look(folder, files, track)
    if len(found) > most * len(files):
        raise DataError(
            f"{_told(folder, found, len(files))}: more than a share of {most:g}, so something else is wrong; "
            "mend or remove them, or let training go on with the rest by data.max_unreadable"
        )
    if found:
        _warn_once(f"{_told(folder, found, len(files))}; left out")
    return found


def _look(folder: Path, files: Sequence[Path], track: Track) -> Mapping[str, str]:
    with _bombs_are_errors(), ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = track(pool.map(_reason, files), f"looking at {folder}", len(files))
        return {
            path.relative_to(folder).as_posix(): reason
            for path, reason in zip(files, reasons, strict=True)
            if reason
        }


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _may_be_file(path: Path) -> bool:
    """Returns whether a path is a file, or a link to nowhere and the like, of which `unreadable` tells."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


@functools.lru_cache
def _warn_once(text: str) -> None:
    _log.warning(text)


def _told(folder: Path, found: Mapping[str, str], total: int) -> str:
    """Returns how many of the files of a folder cannot be read, and the names of some."""
    names = [f"{name} ({reason})" for name, reason in found.items()]
    more = f", and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return f"{len(names)} of {total} images in {folder} cannot be read: {', '.join(names[:NAMES_TOLD])}{more}"


def _reason(path: Path) -> str:
    """Returns why a file cannot be read; empty where it can."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.draft(None, (1, 1))  # what is missing at the end of a JPEG is missing at any size
            image.load()
    except UnidentifiedImageError:  # an OSError that tells the whole path
        return "no image" if path.stat().st_size else "empty"
    except _NOT_AN_IMAGE as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return ""


@contextlib.contextmanager
def _bombs_are_errors() -> Iterator[None]:
    """Makes Pillow's warning of too many pixels an error; its others tell nothing that its errors do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _version(path: Path) -> tuple[int, int]:
    """Returns size and time of a file, which change with it; zeros of one that is not there."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
