"""What every command shares: exit codes, one-line errors, progress, tables and JSON."""

import contextlib
import functools
import inspect
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import typer

from wasi_export.cli._machine_faults import machine_faults
from wasi_export.errors import ExitCode, WasiExportError

if TYPE_CHECKING:
    from wasi_export.cli._documents import ErrorFacts

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

REFRESH_SECONDS = 0.1
VERBOSITY: ContextVar[Literal["quiet", "normal", "verbose"]] = ContextVar("verbosity", default="normal")
"""quiet: results and errors alone; verbose: where an error comes from, and what the libraries log."""

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print the result, or the error, as one JSON document on stdout.")
]
"""Type of the parameter `as_json` that every command has."""
BundleArgument = Annotated[Path, typer.Argument(help="Folder that `wasi-export export` wrote.")]


def exit_codes(command: Callable[P, R]) -> Callable[P, R]:
    """Returns the command so that an error ends it with one line on stderr and the error's exit code.

    With `--json` the error is an object on stdout as well. Ctrl-C ends with 130; what is not an error of
    ours is a bug, and ends with 70 and a traceback.
    """
    assert "as_json" in inspect.signature(command).parameters, "a command has the parameter as_json: JsonFlag"

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with machine_faults():
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except WasiExportError as error:
            if VERBOSITY.get() == "verbose":
                traceback.print_exc()
            code, kind, message = error.exit_code, type(error).__name__, one_line(error)
        except KeyboardInterrupt as error:
            code, kind, message = ExitCode.INTERRUPTED, "Interrupted", str(error) or "interrupted"
        except Exception as error:
            traceback.print_exc()
            code, kind = ExitCode.INTERNAL, type(error).__name__
            message = f"a bug in wasi-export, please report it: {kind}: {error}"
        typer.echo(f"error: {message}", err=True)
        if kwargs.get("as_json"):
            print_error(kind, message, code)
        raise typer.Exit(int(code))

    return wrapper


def one_line(error: WasiExportError) -> str:
    """Returns what an error says, on one line."""
    return " ".join(str(error).split())


def note(text: str) -> None:
    """Says on stderr what goes on, unless only results are wanted."""
    if VERBOSITY.get() != "quiet":
        typer.echo(text, err=True)


def _is_animated() -> bool:
    return sys.stderr.isatty() and VERBOSITY.get() != "quiet"


def track(items: Iterable[T], label: str, total: int) -> Iterable[T]:
    """Yields the items, with a progress bar on stderr where that is a terminal. A `progress.Track`.

    The bar has no thread of its own: its CPU time would be measured with the model that it shows.
    """
    if not _is_animated():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task(label, total=total)
        progress.refresh()
        shown = time.monotonic()
        for item in items:
            yield item
            progress.advance(task)
            if time.monotonic() - shown > REFRESH_SECONDS:
                progress.refresh()
                shown = time.monotonic()


@contextlib.contextmanager
def working(label: str) -> Iterator[None]:
    """Shows on stderr, where that is a terminal, that something goes on, and for how long already."""
    if not _is_animated():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(label, total=None)
        yield


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, align: str | None = None
) -> None:
    """Prints a table on stdout; `align` has l or r for each column, without it all but the first are r.

    Away from a terminal a table is as wide as its cells, so that nothing is cut in a log or a pipe.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for column, side in zip(columns, align or "l".ljust(len(columns), "r"), strict=True):
        table.add_column(Text(column), justify="left" if side == "l" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: a name in square brackets is no markup
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def print_error(kind: str, message: str, code: int) -> None:
    """Prints an error as a JSON document on stdout."""
    from wasi_export.cli._documents import ErrorDocument

    print_json(ErrorDocument(error=error_facts(kind, message, code)))


def error_facts(kind: str, message: str, code: int) -> "ErrorFacts":
    """Returns what a document has of an error."""
    from wasi_export.cli._documents import ErrorFacts

    return ErrorFacts(type=kind, message=message, exit_code=int(code))


def print_json(value: Any) -> None:
    """Prints a pydantic model, or what JSON can hold, as an indented JSON document on stdout."""
    from pydantic_core import to_json

    typer.echo(to_json(value, indent=2, inf_nan_mode="null").decode())
