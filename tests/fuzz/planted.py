"""Readers with bugs, to show that bugs are found."""

import json
import pickle
import subprocess
from pathlib import Path

from fuzz.forms import json_form
from fuzz.readers import Reader

from wasi_export.errors import DataError


def prepare(folder: Path) -> list[bytes]:
    return [b'{"name": "a", "epochs": 3, "classes": ["dark", "light"]}']


def read_carelessly(data: bytes, folder: Path) -> None:
    """Refuses what is no document, and fails on one that has many classes."""
    try:
        document = json.loads(data)
        classes = document["classes"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(f"no document: {error}") from error
    if isinstance(classes, list) and len(classes) > 50:
        raise ValueError("too many classes")


def write_beside(data: bytes, folder: Path) -> None:
    (folder.parent / "beside").write_bytes(data)


def read_beside(data: bytes, folder: Path) -> None:
    (folder / "../../../etc/hostname").read_bytes()


def follow_link(data: bytes, folder: Path) -> None:
    (folder / "link").unlink(missing_ok=True)
    (folder / "link").symlink_to("/etc/hostname")


def start_program(data: bytes, folder: Path) -> None:
    subprocess.run(["true"], check=True)


def unpickle(data: bytes, folder: Path) -> None:
    pickle.loads(b"cbuiltins\nprint\n(Vx\ntR.")  # noqa: S301  # what is to be found


CARELESS = Reader("careless", json_form, prepare, read_carelessly)
FORBIDDEN = {
    "open": write_beside,
    "open /etc": read_beside,
    "os.symlink": follow_link,
    "subprocess.Popen": start_program,
    "pickle.find_class": unpickle,
}
