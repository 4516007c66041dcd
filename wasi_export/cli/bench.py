"""`wasi-export bench`: latency, load time and memory of several models, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track
from wasi_export.cli._target import TargetsOption, end, on_targets

if TYPE_CHECKING:
    from wasi_export.report import Benchmark


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
    target: TargetsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure latency, load time and memory of models side by side, here or on other machines.

    The models run in turns, of several the first one twice: its ratio to itself is the noise floor. Load time
    and peak memory are those of fresh processes. On an emulated board instructions are counted instead: its
    clock says nothing.
    """
    from wasi_export.artifact import Bundle
    from wasi_export.report import Benchmark
    from wasi_export.runtimes.bench import measure_latency
    from wasi_export.runtimes.host import describe_host

    files = [path if path.suffix == ".onnx" else Bundle.open(path).model_path for path in models]
    named = list(zip(map(str, models), files, strict=True))
    if target:
        from wasi_export.runtimes.elsewhere.bench import bench_elsewhere

        outcomes = on_targets(
            target,
            lambda there: bench_elsewhere(
                there, named, batch=batch, threads=threads, rounds=rounds, warmup=warmup
            ),
        )
        if not as_json:
            for outcome in outcomes:
                if outcome.error is None:
                    _show(outcome.name, outcome.result)
        end(outcomes, [], as_json=as_json)
    latency = measure_latency(named, batch=batch, threads=threads, rounds=rounds, warmup=warmup, track=track)
    benchmark = Benchmark(latency=latency, host=describe_host())
    if as_json:
        print_json(benchmark)
    else:
        _show("latency", benchmark)


def _show(title: str, benchmark: "Benchmark") -> None:
    from wasi_export.views import (
        COUNTED,
        INSTRUCTION_COLUMNS,
        LATENCY_COLUMNS,
        describe_board,
        describe_measurement,
        instruction_row,
        latency_row,
    )

    if benchmark.latency:
        columns, align = LATENCY_COLUMNS
        print_table(title, columns, map(latency_row, benchmark.latency), align=align)
        typer.echo(describe_measurement(benchmark.latency[0]))
    if benchmark.instructions:
        columns, align = INSTRUCTION_COLUMNS
        print_table(title, columns, map(instruction_row, benchmark.instructions), align=align)
        typer.echo(COUNTED)
    if benchmark.board:
        typer.echo(describe_board(benchmark.board))
    host = benchmark.host
    typer.echo(f"{host.machine}, {host.processor}, onnxruntime {host.versions['onnxruntime']}")
