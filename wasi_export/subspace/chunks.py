"""A tensor a few rows at a time."""

from collections.abc import Iterator

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def chunks(x: Tensor, size: int) -> Iterator[slice]:
    """Yields the ranges of the first axis of x that hold `size` rows each, the last what is left.

    On fake tensors, which hold no values and are run to count memory, the chunks between the second and the
    last are left out: they need what the second needs.
    """
    starts = range(0, len(x), size)
    alike = isinstance(x, FakeTensor) and len(starts) > 3
    for start in (starts[0], starts[1], starts[-1]) if alike else starts:
        yield slice(start, min(start + size, len(x)))
