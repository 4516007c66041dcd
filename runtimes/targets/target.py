"""What a target can do, and how an error over there becomes one here."""

import json
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pydantic import BaseModel, ValidationError

from wasi_export.errors import (
    CheckFailedError,
    ExitCode,
    HostError,
    IntegrityError,
    ModelFailedError,
    NothingToCheckError,
    UsageError,
    WasiExportError,
)
from wasi_export.report import BoardRun, Evidence

Document = TypeVar("Document", bound=BaseModel)

RUN_SECONDS = 3600.0
"""For what is checked or measured on a target."""
ERRORS: Mapping[int, type[WasiExportError]] = {
    ExitCode.CHECK_FAILED: CheckFailedError,
    ExitCode.USAGE: UsageError,
    ExitCode.HOST: HostError,
    ExitCode.MODEL_FAILED: ModelFailedError,
    ExitCode.NOTHING_TO_CHECK: NothingToCheckError,
    ExitCode.INTEGRITY: IntegrityError,
}


@dataclass(frozen=True)
class Finished:
    """A program that ended on a target."""

    code: int
    stdout: str
    stderr: str
    board: BoardRun | None = None
    """What was watched while it ran, where the target is a board."""


class Target(ABC):
    """A machine that has the base install of wasi-export for as long as the context lasts."""

    name: str
    evidence: Evidence

    def __enter__(self) -> Self:
        """Returns itself: it is there from when it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends what is open."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Ends what is open."""

    @abstractmethod
    def send(self, path: Path) -> str:
        """Returns where a file or folder of this machine is on the target; sent once for its content."""

    @abstractmethod
    def folder(self, name: str) -> str:
        """Returns a folder on the target, which is made, for what is written there under a name."""

    @abstractmethod
    def remove(self, there: str) -> None:
        """Removes a folder that was made for a name."""

    @abstractmethod
    def fetch(self, there: str, here: Path) -> None:
        """Copies the files of a folder of the target into one of this machine, which is made."""

    @abstractmethod
    def run(self, arguments: Sequence[str], *, seconds: float) -> Finished:
        """Runs Python with these arguments on the target.

        Raises:
            HostError: the target cannot be reached, or the program took longer.
        """


@dataclass
class LocalTarget(Target):
    """A Python that this machine can start, and that sees its files: its own, or an emulated one."""

    name: str
    evidence: Evidence
    python: Path
    environment: Mapping[str, str]
    scratch: Path

    def close(self) -> None:
        """Does nothing: nothing is open."""

    def send(self, path: Path) -> str:
        """Returns the path: it is the same over there."""
        return str(path.resolve())

    def folder(self, name: str) -> str:
        """Returns a folder of the scratch space."""
        folder = self.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def remove(self, there: str) -> None:
        """Removes a folder of the scratch space."""
        shutil.rmtree(there)

    def fetch(self, there: str, here: Path) -> None:
        """Copies a folder."""
        shutil.copytree(there, here, dirs_exist_ok=True)

    def run(self, arguments: Sequence[str], *, seconds: float) -> Finished:
        """Runs Python in a process of its own.

        Raises:
            HostError: it took longer.
        """
        try:
            ended = subprocess.run(
                [str(self.python), *arguments],
                env=dict(self.environment),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise HostError(took_too_long(self.name, arguments, seconds)) from None
        return Finished(ended.returncode, ended.stdout, ended.stderr)


def took_too_long(name: str, arguments: Sequence[str], seconds: float) -> str:
    """Returns the message for a program that was stopped."""
    return f"{' '.join(arguments[:3])} on {name} took longer than {seconds:g} s and was stopped"


def output_of(target: Target, arguments: Sequence[str], *, seconds: float) -> Finished:
    """Returns how a program of ours ended, where it has a result: code 0, or a check that failed.

    Raises:
        WasiExportError: the error that the program ended with, and on which target.
        HostError: it ended in another way.
    """
    ended = target.run(arguments, seconds=seconds)
    if ended.code == ExitCode.PASSED or _is_result(ended.stdout):
        return ended
    lines = [line for line in ended.stderr.strip().splitlines() if line.strip()] or ["no message"]
    message = f"on {target.name}: {lines[-1].removeprefix('error: ')}"
    if ended.code < 0:
        raise ModelFailedError(f"{message} (killed by signal {-ended.code})")
    raise ERRORS.get(ended.code, HostError)(message)


def document_of(
    target: Target, kind: type[Document], arguments: Sequence[str], *, seconds: float = RUN_SECONDS
) -> tuple[Document, Finished]:
    """Returns the document that a program of ours printed on a target, and how the program ended.

    Raises:
        WasiExportError: the error that the program ended with, and on which target.
        HostError: it printed something else.
    """
    ended = output_of(target, arguments, seconds=seconds)
    try:
        return kind.model_validate_json(ended.stdout), ended
    except ValidationError as error:
        raise HostError(
            f"{target.name} gave no {kind.__name__} but {ended.stdout[:100]!r}: what else prints there?"
        ) from error


def _is_result(text: str) -> bool:
    """Returns whether this is a document, and not that of an error."""
    try:
        document = json.loads(text)
    except ValueError:
        return False
    return isinstance(document, dict) and "error" not in document
