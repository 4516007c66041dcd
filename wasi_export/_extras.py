"""The one place that names the optional extras."""

import importlib
from types import ModuleType

from wasi_export.errors import MissingExtraError


def require(module: str, *, extra: str) -> ModuleType:
    """Returns the imported module.

    Raises:
        MissingExtraError: the module is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{module} is not installed: pip install 'wasi-export[{extra}]'") from error
