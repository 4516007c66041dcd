"""What `wasi-export plan` adds to a plan: times of this machine, and tables."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wasi_export.allocate import LayerTimes, layer_forms
from wasi_export.cli._console import print_table
from wasi_export.converters.inference import export_inference
from wasi_export.converters.linear_graph import linear_graph
from wasi_export.manifest import InputSpec
from wasi_export.progress import Track
from wasi_export.ranks import ActivationRanks, LayerPlan, break_even_rank
from wasi_export.runtimes.cache import cache_folder
from wasi_export.runtimes.layer_times import measure_layer_times
from wasi_export.subspace.planner import MeasuredModel
from wasi_export.training.planning import PlannedModel

if TYPE_CHECKING:
    from torch import nn


def measure_times(
    model: "nn.Module", spec: InputSpec, measured: MeasuredModel, *, opset: int, threads: int, track: Track
) -> LayerTimes:
    """Returns the times of a dense model's layers, and of its rest, in the runtime on this machine."""
    was_training = model.training
    graph = export_inference(model.cpu(), spec, opset=opset)
    model.train(was_training)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        path.write_bytes(graph.SerializeToString())
        return measure_layer_times(
            path,
            [spectrum.form(None) for spectrum in measured.spectra],
            layer_forms(measured.spectra),
            linear_graph,
            threads=threads,
            cache=cache_folder(),
            track=track,
        )


def print_plan(made: PlannedModel) -> None:
    """Prints the layers and the totals beside those of the dense model."""
    plan = made.plan
    errors = sum(layer.error or 0.0 for layer in plan.layers)
    print_table(
        f"{made.name}: {len(plan.factored)} of {len(plan.layers)} layers factored",
        ("layer", "out×in", "rank", "break-even", "energy", "error", "input", "parameters", "MACs", "why"),
        (_layer_row(layer, errors) for layer in plan.layers),
        align="lrrrrrrrrl",
    )
    targeted = [
        sum(getattr(layer, key) for layer in plan.layers) for key in ("dense_parameters", "parameters")
    ]
    print_table(
        "",
        ("", "dense", "planned", "share"),
        [
            ("parameters of these layers", *_pair(*targeted)),
            *_total_rows(made),
        ],
    )


def _layer_row(layer: LayerPlan, errors: float) -> tuple[str, ...]:
    break_even = break_even_rank(layer.out_features, layer.in_features)
    return (
        layer.name,
        f"{layer.out_features}×{layer.in_features}",
        "–" if layer.rank is None else str(layer.rank),
        f"{break_even:.0f}",
        "–" if layer.energy is None else f"{layer.energy:.4f}",
        f"{(layer.error or 0.0) / errors:.1%}" if errors > 0 else "–",
        _input_ranks(layer.activation),
        f"{layer.parameters:,}",
        "–" if layer.tokens is None else f"{layer.tokens * layer.parameters:,}",
        layer.reason,
    )


def _input_ranks(ranks: ActivationRanks) -> str:
    """Returns the ranks in which the input is kept: feature, then token."""
    given = [str(rank) for rank in (ranks.feature, ranks.token) if rank is not None]
    return "×".join(given) or "whole"


def _total_rows(made: PlannedModel) -> Iterator[tuple[str, ...]]:
    dense, planned = made.dense, made.planned
    yield "parameters of the model", *_pair(dense.parameters, planned.parameters)
    yield "MACs of an image", *_pair(dense.macs, planned.macs)
    yield (
        f"training memory, batch {made.batch_size}, predicted MB",
        *_pair(dense.train_memory_mb, planned.train_memory_mb, "{:,.0f}"),
    )
    if made.first_train_memory_mb is not None:
        yield (
            "the same before layers are factored",
            *_pair(dense.train_memory_mb, made.first_train_memory_mb, "{:,.0f}"),
        )
    if dense.latency_ms is not None and planned.latency_ms is not None:
        yield "latency, predicted ms", *_pair(dense.latency_ms, planned.latency_ms, "{:,.2f}")


def _pair(dense: float, planned: float, form: str = "{:,}") -> tuple[str, str, str]:
    return form.format(dense), form.format(planned), f"{planned / dense:.1%}"
