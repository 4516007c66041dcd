"""`wasi-export validate`: the gate of a CI, and the self-test of a board."""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track


@exit_codes
def validate(
    bundle: Annotated[Path, typer.Argument(help="Folder that `wasi-export export` wrote.")],
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
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Own latency over that of --baseline.")
    ] = None,
    max_size_mb: Annotated[float | None, typer.Option(help="Size of model.onnx, in 10^6 bytes.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs for the latency ratio.")] = 30,
    report: Annotated[
        Path | None, typer.Option(help="Write report.json and report.md into this folder.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a bundle against thresholds, on this machine.

    Checks integrity, load, parity with the golden data, accuracy, latency ratio and size, in this order.
    A threshold for which there is nothing to measure ends with exit code 5, never with a pass.
    """
    from wasi_export.artifact import Bundle
    from wasi_export.config import Thresholds
    from wasi_export.datasets import load_labelled
    from wasi_export.report import check_values
    from wasi_export.runtimes.validate import validate as validate_bundle
    from wasi_export.runtimes.validate import write_report

    flags = {
        "max_parity_error": max_parity_error,
        "min_accuracy": min_accuracy,
        "max_accuracy_drop": max_accuracy_drop,
        "max_latency_ratio": max_latency_ratio,
        "max_size_mb": max_size_mb,
    }
    limits = Thresholds.from_toml(
        thresholds, {name: value for name, value in flags.items() if value is not None}
    )
    opened = Bundle.open(bundle)
    twin = Bundle.open(baseline) if baseline else None
    images = load_labelled(data, opened.manifest.classes).sample(limit, seed=0) if data else None
    result = validate_bundle(
        opened, limits, baseline=twin, images=images, threads=threads, rounds=rounds, track=track
    )
    if report:
        write_report(result, report)
    if as_json:
        print_json(result)
    else:
        rows = [(c.name, c.status, *check_values(c), c.detail) for c in result.checks]
        columns = ("check", "status", "value", "threshold", "detail")
        print_table(f"{result.model}: {result.verdict}", columns, rows, align="llrrl")
        if report:
            typer.echo(f"report: {report / 'report.md'}")
    raise typer.Exit(int(result.exit_code))
