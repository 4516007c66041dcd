"""The command line: one module a command, each of which imports what it needs when it is called."""

import logging
import sys
from typing import Annotated, cast

import typer

from wasi_export import __version__
from wasi_export.cli import (
    adapt,
    bench,
    card,
    doctor,
    export,
    inspect,
    merge,
    plan,
    report,
    run,
    schema,
    sign,
    train,
    train_graph,
    validate,
)
from wasi_export.cli._console import VERBOSITY, print_error

# \b keeps the lines apart.
EXIT_CODES = """\b
Exit codes:
    0  passed
    1  checked and not good enough
    2  usage, configuration or data
    3  this machine cannot run it
    4  the model failed
    5  nothing to check
    6  a file is not what its manifest says
   70  a bug
  130  interrupted"""

app = typer.Typer(
    name="wasi-export",
    help="From a timm vision transformer and labelled images to a validated low-rank ONNX model.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich panels would take half of the time that --help has
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wasi-export {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors alone, no progress.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print where an error comes from, and what libraries log.")
    ] = False,
) -> None:
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose: choose one")
    VERBOSITY.set("quiet" if quiet else "verbose" if verbose else "normal")
    if verbose:
        logging.basicConfig(level=logging.INFO)


for _command in (
    run.run,
    plan.plan,
    train.train,
    export.export,
    train_graph.train_graph,
    validate.validate,
    bench.bench,
    adapt.adapt,
    merge.merge,
    inspect.inspect,
    report.report,
    card.card,
    card.sbom,
    sign.sign,
    sign.verify,
    doctor.doctor,
    schema.schema,
):
    app.command()(_command)


# UsageError of click, base of all that is wrong with what was typed; newer typers have their own click.
_TypedWrong = cast("type[typer.BadParameter]", typer.BadParameter.__base__)


def main() -> None:
    """Runs the command line; with `--json` what was typed wrong is told as an object on stdout as well."""
    try:
        code = app(prog_name="wasi-export", standalone_mode=False)
    except _TypedWrong as error:
        error.show()
        code = error.exit_code
        if "--json" in sys.argv:  # no command has begun, so nobody else knows
            place = error.ctx.command_path if error.ctx else "wasi-export"
            message = " ".join(error.format_message().split()).rstrip(".")
            print_error("UsageError", f"{message}: see `{place} --help`", code)
    sys.exit(code)
