"""Numbers and names, wherever they stand."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wasi_export.errors import MalformedError

MAX_AXIS = 2**31 - 1
MAX_AXES = 16
MAX_NAME = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_name(name: str, what: str) -> None:
    """Lets names pass that are one line and that no terminal obeys: without control characters.

    Raises:
        MalformedError: it is another one.
    """
    if _CONTROL.search(name) or len(name) > MAX_NAME:
        raise MalformedError(f"{name[:60]!r} is no name of a {what}")


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Lets the shapes of tensors pass that can be held.

    Raises:
        MalformedError: it has an axis or a number of axes that no tensor of ours has.
    """
    if len(shape) > MAX_AXES or not all(0 <= axis <= MAX_AXIS for axis in shape):
        raise MalformedError(f"{name!r} has the absurd shape {list(shape[:MAX_AXES])}")


def check_finite(name: str, values: NDArray[Any]) -> None:
    """Lets finite numbers pass, and masks of attention: 0 where it may look, -∞ where not.

    Raises:
        MalformedError: there is another NaN or infinity, or a type that numpy does not have by itself.
    """
    if values.dtype.kind not in "biuf":
        raise MalformedError(f"{name!r} is of type {values.dtype}, which no tensor of ours is")
    if not np.issubdtype(values.dtype, np.floating):
        return
    finite = np.isfinite(values)
    if not finite.all() and not ((values == 0) | np.isneginf(values)).all():
        raise MalformedError(
            f"{name!r} holds {values.size - np.count_nonzero(finite)} NaN or infinite numbers"
        )
