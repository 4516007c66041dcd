"""`wasi-export run`: everything, from images to a validated bundle, once or for every job of a sweep."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from wasi_export.cli._config import ConfigFile, Overrides, read_config
from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table
from wasi_export.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wasi_export.cli._summary import RunSummary
    from wasi_export.cli._sweep import Job
    from wasi_export.cli._sweep_table import SweepTable


@exit_codes
def run(
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of all results. Default: runs/NAME.")
    ] = None,
    overrides: Overrides = None,
    dense: Annotated[
        Path | None, typer.Option(help="Folder of a dense run to share. Default: dense/ below --out.")
    ] = None,
    array: Annotated[
        str | None, typer.Option(metavar="I/N", help="Of a sweep: run the I-th of N parts, I from 1.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Of a sweep: run nothing, write the table.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Do every stage anew.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration or the sweep's jobs, and stop.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train dense, then low-rank, export both, validate, and print one table.

    A stage whose inputs have not changed is not done again; one that was interrupted resumes. The exit code
    is that of the validation.

    A CONFIG with a table [sweep] is many such runs, see docs/scaling.md; --array runs a part of them. The
    exit code is the worst of the part's jobs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"run is one process, WORLD_SIZE is {os.environ['WORLD_SIZE']}: train on several with "
            "`wasi-export train`"
        )
    jobs = None
    if config is not None:
        from wasi_export.cli._sweep import read_sweep

        jobs = read_sweep(config, overrides or ())
    if jobs is not None:
        assert config is not None
        if force or dense is not None:
            raise UsageError(f"{config} is a sweep: --force and --dense are for a single run")
        _run_sweep(
            jobs, out or Path("runs") / config.stem,
            array=array, merge=merge, dry_run=dry_run, as_json=as_json,
        )  # fmt: skip
    if array is not None or merge:
        raise UsageError(f"--array and --merge are for a sweep, {config or 'the demo'} has no table [sweep]")
    settings = read_config(config, overrides)
    if dry_run:
        if as_json:
            print_json(settings)
        else:
            typer.echo(settings.to_toml(), nl=False)
        return
    from wasi_export.cli._pipeline import Pipeline

    summary = Pipeline(settings, out or Path("runs") / settings.name, dense=dense, force=force).run()
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)
    raise typer.Exit(summary.exit_code)


def _run_sweep(
    jobs: "Sequence[Job]", folder: Path, *, array: str | None, merge: bool, dry_run: bool, as_json: bool
) -> NoReturn:
    """Runs a part of the jobs of a sweep, or all, merges what is finished, and ends the command.

    Raises:
        Exit: always.
    """
    from wasi_export.cli._documents import JobNames
    from wasi_export.cli._sweep import Part
    from wasi_export.cli._sweep_run import finished_job, run_jobs
    from wasi_export.cli._sweep_table import merge as merge_jobs

    mine = Part.parse(array or "1/1").of(jobs)
    if dry_run:
        names = [job.name for job in mine]
        print_json(JobNames(jobs=tuple(names))) if as_json else typer.echo("\n".join(names))
        raise typer.Exit
    code = 0 if merge else run_jobs(mine, folder)
    table = merge_jobs(jobs, folder, lambda job: finished_job(job, folder))
    if as_json:
        print_json(table)
    else:
        _print_sweep(table, folder)
    raise typer.Exit(code)


def _print_sweep(table: "SweepTable", folder: Path) -> None:
    columns, rows, align = table.cells()
    print_table(table.title, columns, rows, align=align)
    typer.echo(f"table: {folder / 'sweep.md'}")


def _print_summary(summary: "RunSummary") -> None:
    from wasi_export.cli._summary import COLUMNS

    print_table(f"{summary.name}: {summary.verdict}", COLUMNS, summary.cells())
    typer.echo(f"bundle: {summary.bundle}")
    typer.echo(f"report: {summary.report}")
    page = summary.page or "not written, jinja2 is not installed: pip install 'wasi-export[report]'"
    typer.echo(f"page: {page}")
