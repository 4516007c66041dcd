"""Files of safetensors: numbers alone, finite ones, under names that can be printed.

The library has checked by then that the header is JSON below 100 MB and that the tensors fill the file
without holes and overlaps.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from wasi_export.errors import MalformedError
from wasi_export.untrusted.values import check_finite, check_name, check_shape


def check_tensors(path: Path) -> None:
    """Looks at every tensor of a file, one after another.

    Raises:
        MalformedError: it is no safetensors, or holds what no weights are.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                check_name(name, "tensor")
                check_shape(name, tuple(file.get_slice(name).get_shape()))
                check_finite(name, file.get_tensor(name))
    except (SafetensorError, TypeError, ValueError) as error:  # the latter two: a type that numpy has not
        raise MalformedError(f"it is no safetensors of numpy's types: {error}") from None
