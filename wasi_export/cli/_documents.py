"""What commands print with `--json` where no part of the library has a name for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from wasi_export.settings import Frozen


class ErrorFacts(Frozen):
    """An error that ended a command, or the work on one target."""

    type: str = Field(description="class of the error, as ConfigError; Interrupted for Ctrl-C")
    message: str = Field(description="one line: what was wrong, what was got, what to do")
    exit_code: int


class ErrorDocument(Frozen):
    """What any command prints in place of its result."""

    schema_version: Literal[1] = 1
    error: ErrorFacts


class JobNames(Frozen):
    """The jobs of a sweep that would be run."""

    schema_version: Literal[1] = 1
    jobs: tuple[str, ...]


class Verdict(Frozen):
    """The verdict of one report."""

    target: str = Field(description="where it was checked; `this machine` is where the command ran")
    verdict: str


class WrittenPage(Frozen):
    """The page of a report, and the verdicts that are on it."""

    schema_version: Literal[1] = 1
    report: Path
    model: str
    verdicts: tuple[Verdict, ...] = Field(description="of each report, in the order of the page")


class WrittenFile(Frozen):
    """A file that a command wrote."""

    schema_version: Literal[1] = 1
    written: Path


class WrittenFiles(Frozen):
    """The files that a command wrote."""

    schema_version: Literal[1] = 1
    written: tuple[Path, ...]


class SignedBundle(Frozen):
    """Where the signature of a bundle was written."""

    schema_version: Literal[1] = 1
    signature: Path


class VerifiedBundle(Frozen):
    """A bundle whose signature is that of the given signer."""

    schema_version: Literal[1] = 1
    bundle: Path
    files: int


class SchemaList(Frozen):
    """The documents that `schema` knows."""

    schema_version: Literal[1] = 1
    documents: Mapping[str, str] = Field(description="name, and what prints or writes it")
