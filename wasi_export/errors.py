"""Every error that a user can cause, and the exit code it ends the command with.

    WasiExportError
    ├── CheckFailedError        1   checked, and not good enough
    │   └── ParityError
    ├── UsageError              2   usage or configuration
    │   ├── ConfigError
    │   ├── RankError
    │   ├── DataError
    │   ├── UnsupportedModelError
    │   └── ArtifactExistsError
    ├── HostError               3   this machine cannot run it
    │   └── MissingExtraError       (also an ImportError)
    ├── ModelFailedError        4   the model failed while running
    ├── NothingToCheckError     5   nothing to check, so nothing passed
    └── IntegrityError          6   a file is not what its manifest says
        └── MalformedError          nor what any program of ours writes

A message says what was wrong, the value that was got, and what to do.
"""

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    PASSED = 0
    CHECK_FAILED = 1
    USAGE = 2
    HOST = 3
    MODEL_FAILED = 4
    NOTHING_TO_CHECK = 5
    INTEGRITY = 6
    INTERNAL = 70
    INTERRUPTED = 130


_LEAST_FIRST = (
    ExitCode.PASSED,
    ExitCode.NOTHING_TO_CHECK,
    ExitCode.INTERRUPTED,
    ExitCode.HOST,
    ExitCode.USAGE,
    ExitCode.CHECK_FAILED,
    ExitCode.MODEL_FAILED,
    ExitCode.INTEGRITY,
)


def worst(codes: Iterable[int]) -> int:
    """Returns the exit code of several jobs or machines together; 0 of none.

    From the least to the worst:

        0                passed
        5, 130, 3, 2     not found out: nothing to check or undecided, interrupted, the machine, the usage
        1, 4, 6          found to be bad: a check, the model, a file
        70 and others    a bug, or a signal that killed the command: nothing is known

    What was found to be bad stays so, however the rest ends; among what was not found out, the one that
    asks for more before it can be.
    """
    ranks = {int(code): rank for rank, code in enumerate(_LEAST_FIRST)}
    return max(map(int, codes), key=lambda code: ranks.get(code, len(ranks)), default=int(ExitCode.PASSED))


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error of another library says, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def some(names: Iterable[str], most: int = 5) -> str:
    """Returns the first of many names, for a message."""
    names = tuple(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


class WasiExportError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = ExitCode.INTERNAL


class CheckFailedError(WasiExportError):
    """A check ran and its result is not good enough."""

    exit_code = ExitCode.CHECK_FAILED


class ParityError(CheckFailedError):
    """Two computations of the same model differ by more than the tolerance."""


class UsageError(WasiExportError):
    """The command or the configuration asks for something that cannot be."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """A configuration file or option is wrong."""


class RankError(UsageError):
    """A rank, a fraction or an explained energy is out of range."""


class DataError(UsageError):
    """A data set or an image cannot be read."""


class UnsupportedModelError(UsageError):
    """The model has nothing to factor, or cannot be exported."""


class ArtifactExistsError(UsageError):
    """An output exists already and `--force` was not given."""


class HostError(WasiExportError):
    """This machine cannot run what was asked."""

    exit_code = ExitCode.HOST


class MissingExtraError(HostError, ImportError):
    """An optional dependency is not installed."""


class ModelFailedError(WasiExportError):
    """The model failed while it was loaded or run."""

    exit_code = ExitCode.MODEL_FAILED


class NothingToCheckError(WasiExportError):
    """There is nothing to check; nothing checked is never a pass."""

    exit_code = ExitCode.NOTHING_TO_CHECK


class IntegrityError(WasiExportError):
    """A file is missing, changed, or not described by the manifest."""

    exit_code = ExitCode.INTEGRITY


class MalformedError(IntegrityError):
    """A file holds what no program of ours writes; the message does not name it."""
