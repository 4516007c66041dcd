"""The one place that names the optional extras."""

import importlib
from importlib.metadata import PackageNotFoundError, version
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
        raise MissingExtraError(_told(module, extra)) from error


def require_version(package: str, *, extra: str) -> str:
    """Returns the version of an installed package, without importing it.

    Raises:
        MissingExtraError: it is not installed; the message has the command that installs it.
    """
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise MissingExtraError(_told(package, extra)) from error


def _told(name: str, extra: str) -> str:
    return f"{name} is not installed: pip install 'wasi-export[{extra}]'"
