"""Which factored layers are exported dense: those that this machine runs faster so."""

from collections.abc import Iterable

from wasi_export.config import Fold
from wasi_export.converters.linear_graph import linear_graph
from wasi_export.cost import LinearForm
from wasi_export.progress import Track, silent
from wasi_export.ranks import LayerPlan, Plan
from wasi_export.runtimes.cache import cache_folder
from wasi_export.runtimes.layer_times import measure_forms


def choose_folds(plan: Plan, fold: Fold, *, threads: int = 1, track: Track = silent) -> Plan:
    """Returns the plan with the layers dense that are to be, and with the measured times of both forms.

    Args:
        plan: of the factored model.
        fold: which layers; with `auto` those that are faster dense.
        threads: of the runtime.
        track: progress display.

    Raises:
        IntegrityError: the file of times is damaged.
    """
    if fold == "never":
        return plan
    if fold == "always":
        return _replaced(plan, (_dense(layer, "folded, as asked for") for layer in plan.factored))
    timed = [layer for layer in plan.factored if layer.tokens is not None]
    forms = [form for layer in timed for form in _forms(layer)]
    times = measure_forms(forms, linear_graph, threads=threads, cache=cache_folder(), track=track)
    chosen = []
    for layer in timed:
        factored_ms, dense_ms = (times[form] for form in _forms(layer))
        layer = layer.model_copy(update={"factored_ms": factored_ms, "dense_ms": dense_ms})
        if dense_ms < factored_ms:
            layer = _dense(layer, f"folded: {dense_ms:.3f} ms dense, {factored_ms:.3f} as a pair")
        chosen.append(layer)
    return _replaced(plan, chosen)


def _forms(layer: LayerPlan) -> tuple[LinearForm, LinearForm]:
    """Returns a layer as a pair, and dense."""
    assert layer.tokens is not None
    sizes = (layer.out_features, layer.in_features, layer.tokens)
    return LinearForm(*sizes, rank=layer.rank), LinearForm(*sizes, rank=None)


def _dense(layer: LayerPlan, reason: str) -> LayerPlan:
    return layer.model_copy(update={"rank": None, "reason": reason})


def _replaced(plan: Plan, layers: Iterable[LayerPlan]) -> Plan:
    """Returns the plan with some of its layers as they are given."""
    new = {layer.name: layer for layer in layers}
    return plan.model_copy(update={"layers": tuple(new.get(layer.name, layer) for layer in plan.layers)})
