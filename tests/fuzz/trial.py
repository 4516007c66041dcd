"""One input given to one reader, and what becomes of it: nothing, or a finding.

A finding is an error that is none of ours, and what `guard.py` refuses. An input that hangs, or takes too
much memory, is found by libFuzzer (`engine.py`).
"""

import traceback
from dataclasses import dataclass
from pathlib import Path

from fuzz.guard import ForbiddenError, only_below
from fuzz.readers import Reader

from wasi_export.errors import WasiExportError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finding:
    """An input that a reader neither reads nor refuses."""

    reader: str
    error: str
    """Its class, and the function of this repository that it comes from."""
    message: str
    data: bytes


def try_input(reader: Reader, data: bytes, folder: Path) -> Finding | None:
    """Returns the finding that an input is, if it is one."""
    try:
        with only_below(folder):
            reader.read(data, folder)
    except WasiExportError:
        return None
    except (Exception, ForbiddenError) as error:
        lines = " ".join(str(error).split())
        return Finding(reader.name, f"{type(error).__name__} in {_place(error)}", lines[:200], data)
    return None


def _place(error: BaseException) -> str:
    """Returns the innermost function of this repository that an error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(ROOT)]
    own = [frame for frame in own if "site-packages" not in frame.filename]
    frame = own[-1]
    return f"{Path(frame.filename).resolve().relative_to(ROOT)} {frame.name}"
