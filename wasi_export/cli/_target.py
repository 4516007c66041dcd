"""`--target`: a command on other machines, on several at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from wasi_export.cli._console import error_facts, one_line, print_json, working
from wasi_export.errors import UsageError, WasiExportError, worst

if TYPE_CHECKING:
    from wasi_export.cli._target_results import TargetResult
    from wasi_export.runtimes.targets.target import Target

R = TypeVar("R")
SUMMARY = "summary.json"
"""Beside the report of a run, and of no other."""

TARGET_HELP = "Where: arm64 (a Raspberry Pi 5, emulated here; arm64:pi4 is a Pi 4) or ssh://[user@]host[:port][/folder]."
TargetOption = Annotated[str | None, typer.Option(help=TARGET_HELP)]
TargetsOption = Annotated[list[str] | None, typer.Option("--target", help=f"{TARGET_HELP} Can be repeated.")]


class Outcome(NamedTuple):
    """What came of a target: a result, or the error that kept it from one."""

    name: str
    result: Any
    error: WasiExportError | None


def on_targets(names: Sequence[str], work: "Callable[[Target], R]") -> list[Outcome]:
    """Returns what came of each target, in their order; they work at the same time.

    Raises:
        WasiExportError: there is one target alone, and it failed.
    """
    from wasi_export.runtimes.targets.address import open_target

    def work_on(name: str) -> Outcome:
        try:
            with ExitStack() as stack:
                return Outcome(name, work(stack.enter_context(open_target(name))), None)
        except WasiExportError as error:
            if len(names) == 1:
                raise
            return Outcome(name, None, error)

    with working(f"on {', '.join(names)}"):
        if len(names) == 1:
            return [work_on(names[0])]
        with ThreadPoolExecutor(len(names)) as pool:
            return list(pool.map(work_on, names))


def end(outcomes: Sequence[Outcome], codes: Sequence[int], *, as_json: bool) -> None:
    """Tells of the targets that failed, prints the JSON where it is asked for, and ends with the worst code.

    One target prints its result alone, several a list of results and errors.

    Raises:
        Exit: always.
    """
    if as_json and len(outcomes) == 1:
        print_json(outcomes[0].result)
    elif as_json:
        from wasi_export.cli._target_results import TargetResults

        print_json(TargetResults(targets=tuple(map(_as_document, outcomes))))
    for outcome in outcomes:
        if outcome.error is not None:
            typer.echo(f"error: {outcome.name}: {one_line(outcome.error)}", err=True)
    failures = [int(outcome.error.exit_code) for outcome in outcomes if outcome.error]
    raise typer.Exit(worst([*codes, *failures]))


def report_folder(folder: Path, name: str, count: int) -> Path:
    """Returns where the report of a target goes: a folder of its own where there are several."""
    return folder if count == 1 else folder / "".join(c if c.isalnum() or c in "-." else "-" for c in name)


def refuse_run_report(folder: Path, targets: Sequence[str]) -> None:
    """Lets a folder pass that the reports of targets may be written to; no target is this machine.

    Raises:
        UsageError: it has the report of a `wasi-export run`, and that would be written over.
    """
    if len(targets) < 2 and (folder / SUMMARY).exists():
        other = report_folder(folder, targets[0], 2) if targets else folder.resolve().with_name("validation")
        raise UsageError(f"{folder} has the report of a run, which would be lost: give another, as {other}")


def _as_document(outcome: Outcome) -> "TargetResult":
    from wasi_export.cli._target_results import TargetResult

    error = None
    if outcome.error is not None:
        error = error_facts(type(outcome.error).__name__, one_line(outcome.error), outcome.error.exit_code)
    return TargetResult(target=outcome.name, result=outcome.result, error=error)
