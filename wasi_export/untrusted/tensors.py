"""Files of safetensors: numbers alone, finite ones, under names that can be printed.

The library has checked by then that the header is JSON below 100 MB and that the tensors fill the file
without holes and overlaps.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from wasi_export.errors import IntegrityError, MalformedError
from wasi_export.untrusted.values import check_finite, check_name, check_shape


def check_tensors(path: Path) -> None:
    """Looks at every tensor of a file, one after another.

    Raises:
        MalformedError: it is no safetensors, or holds what no weights are.
        OSError: the file cannot be read.
    """
    with _opened(path) as file:
        for _ in _checked(file):
            pass


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Returns the tensors of a file by name, and the texts of its header, having looked at them.

    They are copies, so that the file can be replaced while they are in use.

    Raises:
        MalformedError: it is no safetensors, or holds what no weights are.
        OSError: the file cannot be read.
    """
    with _opened(path) as file:
        return {name: np.array(value) for name, value in _checked(file)}, file.metadata() or {}


def load_unchecked(path: Path, what: str) -> dict[str, NDArray[Any]]:
    """Returns the tensors of a file by name, whatever their values are: looked at before, or compared later.

    Args:
        path: of the file.
        what: it should hold, for the message.

    Raises:
        IntegrityError: it is missing, or no safetensors.
    """
    try:
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, MalformedError) as error:
        raise IntegrityError(f"{path} holds no {what}: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, TypeError, ValueError) as error:  # the latter two: a type that numpy has not
        raise MalformedError(f"it is no safetensors of numpy's types: {error}") from None


def _checked(file: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields the tensors of an open file, each once it was looked at."""
    for name in file.keys():  # noqa: SIM118
        check_name(name, "tensor")
        check_shape(name, tuple(file.get_slice(name).get_shape()))
        check_finite(name, value := file.get_tensor(name))
        yield name, value
