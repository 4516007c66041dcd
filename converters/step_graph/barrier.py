"""An order that a runtime must keep, in a graph that has no other words for it than data.

ONNX orders operators by what they read alone. `after(value, other)` reads both, and is `value`:

    value + 0·other₀

A number that is not finite in `other` goes into the value; the loss of the next step tells.
"""

from torch import Tensor


def after(value: Tensor, *others: Tensor) -> Tensor:
    """Returns a value that is there only once the others were computed."""
    for other in others:
        value = value + 0.0 * other[(0,) * other.ndim]
    return value
