"""`wasi-export plan`: the dry run of the subspace stage."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wasi_export.cli._config import ConfigFile, Overrides, read_config
from wasi_export.cli._console import JsonFlag, exit_codes, print_json, track
from wasi_export.cli._torch import prepare_torch

if TYPE_CHECKING:
    from wasi_export.allocate import LayerTimes
    from wasi_export.subspace.planner import MeasuredModel


@exit_codes
def plan(
    config: ConfigFile = None,
    init: Annotated[
        Path | None, typer.Option(help="Finished dense run to start from. Default: the config's weights.")
    ] = None,
    max_params: Annotated[
        float | None, typer.Option(help="Most parameters of the whole model, as 5e6.")
    ] = None,
    max_macs: Annotated[
        float | None, typer.Option(help="Most multiply-adds of the whole model for one image, as 1e9.")
    ] = None,
    max_train_memory_mb: Annotated[
        float | None, typer.Option(help="Highest predicted peak of a training step, in MB.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Highest predicted latency of one image on this machine.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Explained energy to keep.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Parameters of the factored layers over the dense ones.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that the latency is for.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan to this JSON file, for subspace.plan.")
    ] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show which layers would be factored, at which rank and why. Trains nothing.

    Under budgets, of which several can be given, ranks go where they lower the predicted output error most.
    """
    budgets = {
        "max_params": max_params,
        "max_macs": max_macs,
        "max_train_memory_mb": max_train_memory_mb,
        "max_latency_ms": max_latency_ms,
    }
    given = [f"subspace.{key}={value}" for key, value in budgets.items() if value is not None]
    by_error = ["subspace.allocation=output_error"] if given else []
    measures = {"epsilon": epsilon, "fraction": fraction}
    given += [f"subspace.{key}={value}" for key, value in measures.items() if value is not None]
    settings = read_config(config, [*by_error, *(overrides or ()), *given])
    from wasi_export.datasets import load_data
    from wasi_export.durable import require_new, write_bytes

    if out is not None:
        require_new(out, force=force)
    prepare_torch()
    from wasi_export.cli._plan import measure_times, print_plan
    from wasi_export.training.beginning import first_model
    from wasi_export.training.models import input_spec
    from wasi_export.training.planning import plan_model

    images, _ = load_data(settings.data, track=track)
    model = first_model(settings, images.classes, init)

    def times_of(measured: "MeasuredModel") -> "LayerTimes":
        spec, opset = input_spec(model, settings), settings.export.opset
        return measure_times(model, spec, measured, opset=opset, threads=threads, track=track)

    made = plan_model(settings, model, images, goes_on=init is not None, times_of=times_of, track=track)
    if out is not None:
        write_bytes(out, made.plan.model_dump_json(indent=2).encode())
    if as_json:
        print_json(made)
    else:
        print_plan(made)
