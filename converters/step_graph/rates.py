"""The rate and the decay of each parameter, relative to those of the step: as in training.

The head may have a rate of its own, and so may the factors; theirs else make up for their shape
(`rate_scale`). A head that is factored has the rate of the head.
Vectors, biases and what the model lists (position embedding, class token) are not decayed.
"""

from collections.abc import Sequence

from torch import nn

from wasi_export.converters.step_graph.optimizers import Rates
from wasi_export.converters.step_graph.trainable import head_names
from wasi_export.subspace import subspace_layers
from wasi_export.subspace.update import rate_scale


def parameter_rates(
    model: nn.Module, trainable: Sequence[str], *, head: float = 1.0, factors: float | None = None
) -> dict[str, Rates]:
    """Returns the rates of the parameters that are trained.

    Args:
        model: a timm model, dense or factored.
        trainable: names of parameters.
        head: rate of the head over that of the step.
        factors: of the factors; None: by their shape.
    """
    lr: dict[str, float] = {}
    for name, layer in subspace_layers(model):
        rates = rate_scale(layer) if factors is None else (factors, factors)
        lr[f"{name}.left"], lr[f"{name}.right"] = rates
    lr |= dict.fromkeys(head_names(model), head)
    kept = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    shapes = dict(model.named_parameters())
    return {
        name: Rates(lr=lr.get(name, 1.0), decay=float(shapes[name].ndim > 1 and name not in kept))
        for name in trainable
    }
