"""`wasi-export bench`: latency, load time and memory of several models, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track


@exit_codes
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(help="Bundles or ONNX files; the ratios are to the first.", metavar="MODEL..."),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Images a run.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of every model.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before the timed ones.")] = 5,
    as_json: JsonFlag = False,
) -> None:
    """Measure latency, load time and memory of models side by side.

    The models run in turns; load time and peak memory are those of fresh processes.
    """
    from wasi_export.artifact import Bundle
    from wasi_export.report import LATENCY_COLUMNS, Benchmark, describe_measurement, latency_row
    from wasi_export.runtimes.bench import measure_latency
    from wasi_export.runtimes.host import describe_host

    files = [path if path.suffix == ".onnx" else Bundle.open(path).model_path for path in models]
    latency = measure_latency(
        list(zip(map(str, models), files, strict=True)),
        batch=batch,
        threads=threads,
        rounds=rounds,
        warmup=warmup,
        track=track,
    )
    benchmark = Benchmark(latency=latency, host=describe_host())
    if as_json:
        print_json(benchmark)
        return
    columns, align = LATENCY_COLUMNS
    print_table("latency", columns, map(latency_row, latency), align=align)
    host = benchmark.host
    typer.echo(describe_measurement(latency[0]))
    typer.echo(f"{host.machine}, {host.processor}, onnxruntime {host.versions['onnxruntime']}")
