"""`wasi-export validate`: the gate of a CI, and the self-test of a board."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._console import BundleArgument, JsonFlag, exit_codes, print_table, track
from wasi_export.cli._options import require_option
from wasi_export.cli._target import Outcome, TargetsOption, end, on_targets, refuse_run_report, report_folder
from wasi_export.errors import UsageError, WasiExportError


@exit_codes
def validate(
    context: typer.Context,
    bundle: BundleArgument,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images: a folder of class folders, `digits` or `fashion-mnist`."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take so many of the images, drawn by seed 0.")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="Bundle of the dense twin.")] = None,
    thresholds: Annotated[
        Path | None, typer.Option(help="TOML file of thresholds; options override it.")
    ] = None,
    max_parity_error: Annotated[
        float | None, typer.Option(help="Of the output scale. Default: 1e-5.")
    ] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Top-1 on --data, in [0, 1].")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Top-1 of --baseline minus own.")] = None,
    accuracy_confidence: Annotated[
        float | None,
        typer.Option(help="How sure those two must be, as 0.95. Default: as measured on these images."),
    ] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Own latency over that of --baseline.")
    ] = None,
    max_size_mb: Annotated[float | None, typer.Option(help="Size of model.onnx, in 10^6 bytes.")] = None,
    max_memory_mb: Annotated[
        float | None, typer.Option(help="Peak memory of a process that runs one image, in 10^6 bytes.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")] = 1,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed runs for the latency ratio; four times that while undecided.")
    ] = 30,
    report: Annotated[
        Path | None, typer.Option(help="Write report.json, report.md and report.junit.xml here.")
    ] = None,
    target: TargetsOption = None,
    steps: Annotated[
        int, typer.Option(min=0, help="Steps of training that --target repeats, at most.")
    ] = 200,
    seconds: Annotated[
        float, typer.Option(min=0, help="After which --target begins no image or step, for each graph.")
    ] = 30.0,
    before: Annotated[
        Path | None,
        typer.Option(help="report.json of before: instructions on --target arm64 may grow by 2 %."),
    ] = None,
    github: Annotated[
        bool,
        typer.Option(
            "--github", help="Print annotations of a GitHub workflow, and append to the summary of the job."
        ),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Check a bundle against thresholds, on this machine or on others.

    Checks integrity, load, parity with the golden data, accuracy, latency ratio, size and memory, in this
    order. A threshold for which there is nothing to measure, or that is within the uncertainty of what was
    measured, ends with exit code 5, never with a pass.

    With --target all of it is done there, and outputs and training are compared with those of this machine.
    An emulated board has no latency: its instructions are counted.
    """
    from wasi_export.artifact import Bundle
    from wasi_export.config import Thresholds
    from wasi_export.datasets import load_labelled
    from wasi_export.runtimes.validate import read_report
    from wasi_export.runtimes.validate import validate as validate_bundle

    if github and as_json:
        raise UsageError("--github and --json both print to stdout: give one, and --report for the other")
    require_option(context, "data", ("limit",))
    require_option(context, "target", ("steps", "seconds"))
    if report:
        refuse_run_report(report, target or ())
    flags = {
        "max_parity_error": max_parity_error,
        "min_accuracy": min_accuracy,
        "max_accuracy_drop": max_accuracy_drop,
        "accuracy_confidence": accuracy_confidence,
        "max_latency_ratio": max_latency_ratio,
        "max_size_mb": max_size_mb,
        "max_memory_mb": max_memory_mb,
    }
    limits = Thresholds.from_toml(
        thresholds, {name: value for name, value in flags.items() if value is not None}
    )
    with _annotated(str(bundle), github=github):
        opened = Bundle.open(bundle)
        twin = Bundle.open(baseline) if baseline else None
        if target:
            from wasi_export.runtimes.elsewhere.validate import Elsewhere, validate_elsewhere

            asked = Elsewhere(
                baseline=twin,
                data=data,
                limit=limit,
                threads=threads,
                rounds=rounds,
                steps=steps,
                seconds=seconds,
                before=read_report(before) if before else None,
            )
            outcomes = on_targets(target, lambda there: validate_elsewhere(there, opened, limits, asked))
        elif before:
            raise UsageError("--before is of counted instructions, which need --target arm64: give it too")
        else:
            images = None
            if data:
                known = load_labelled(
                    data, opened.manifest.classes, trained_on=opened.trained_on, track=track
                )
                images = known.sample(limit, seed=0)
            found = validate_bundle(
                opened, limits, baseline=twin, images=images, threads=threads, rounds=rounds, track=track
            )
            outcomes = [Outcome("", found, None)]
    if github:
        _tell_github(outcomes)
    _show(outcomes, report, as_json=as_json)


@contextlib.contextmanager
def _annotated(title: str, *, github: bool) -> Iterator[None]:
    """Prints an error of ours as an annotation, where that is wanted, and lets it go on."""
    try:
        yield
    except WasiExportError as error:
        if github:
            from wasi_export.github import annotation

            typer.echo(annotation("error", title, str(error)))
        raise


def _tell_github(outcomes: list[Outcome]) -> None:
    """Prints the annotations of all machines, and appends their reports to the summary of the job."""
    from wasi_export.github import annotation, annotations, append_summary

    for outcome in outcomes:
        if outcome.error is not None:
            typer.echo(annotation("error", outcome.name, str(outcome.error)))
        else:
            typer.echo("\n".join(annotations(outcome.result)))
    append_summary(outcome.result for outcome in outcomes if outcome.error is None)


def _show(outcomes: list[Outcome], folder: Path | None, *, as_json: bool) -> None:
    """Prints one table of all machines, writes their reports, and ends the command."""
    from wasi_export.runtimes.validate import write_report
    from wasi_export.views import (
        INSTRUCTION_COLUMNS,
        LATENCY_COLUMNS,
        check_values,
        describe_board,
        instruction_row,
        latency_row,
    )

    found = [(outcome.name, outcome.result) for outcome in outcomes if outcome.error is None]
    if folder:
        for name, result in found:
            write_report(result, report_folder(folder, name, len(outcomes)))
    if not as_json:
        elsewhere = any(name for name, _ in found)
        rows = [
            (*((name,) if elsewhere else ()), c.name, c.status, *check_values(c), c.evidence, c.detail)
            for name, result in found
            for c in result.checks
        ]
        columns = ("target", "check", "status", "value", "threshold", "evidence", "detail")
        verdicts = [
            f"{result.model}{f' on {name}' if name else ''}: {result.verdict}" for name, result in found
        ]
        start = int(not elsewhere)
        print_table("; ".join(verdicts), columns[start:], rows, align="lllrrll"[start:])
        for name, result in found:
            if result.instructions:
                names, align = INSTRUCTION_COLUMNS
                print_table(name, names, map(instruction_row, result.instructions), align=align)
            if result.latency and name:
                names, align = LATENCY_COLUMNS
                print_table(name, names, map(latency_row, result.latency), align=align)
            if result.board:
                typer.echo(describe_board(result.board))
        if folder:
            typer.echo(f"report: {folder}")
    end(outcomes, [int(result.exit_code) for _, result in found], as_json=as_json)
