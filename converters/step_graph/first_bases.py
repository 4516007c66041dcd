"""The bases that a step begins with: the leading axes of the inputs of its layers, for some real images.

As many of each mode as hold a share of its energy (`subspace.activation_ranks`). Zeros are no start for a
subspace iteration, and a basis that the first batch would have to make is one more state to tell apart; the
images that a bundle is checked with are at hand, and their bases travel with it.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wasi_export.config import StepActivation
from wasi_export.converters.step_graph.compress import input_rows
from wasi_export.subspace import subspace_layers
from wasi_export.subspace.activation_ranks import ModeEnergies, ranks_by_energy
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.moments import InputMoments, PrincipalAxes
from wasi_export.subspace.tucker import Bases


def first_bases(
    model: nn.Module,
    trainable: Sequence[str],
    images: NDArray[np.float32],
    mode: StepActivation,
    epsilon: float,
) -> dict[str, Bases]:
    """Returns the bases by the names of the factored layers that are trained; none for a layer that is whole.

    Args:
        model: as it is exported; in eval mode from here on.
        trainable: names of the parameters that are trained.
        images: [B, C, H, W].
        mode: which bases there are.
        epsilon: energy of each mode that a basis has at least.
    """
    if mode == "none":
        return {}
    layers = {
        name: layer
        for name, layer in subspace_layers(model)
        if not {f"{name}.left", f"{name}.right"}.isdisjoint(trainable)
    }
    moments = _moments(model.eval(), layers, torch.from_numpy(images))
    found = {name: _bases(layers[name], moments[name], mode, epsilon) for name in layers}
    return {name: bases for name, bases in found.items() if bases != Bases()}


@torch.no_grad()
def _moments(
    model: nn.Module, layers: Mapping[str, SubspaceLinear], images: Tensor
) -> dict[str, InputMoments]:
    moments = {name: InputMoments() for name in layers}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: moments[name].add(input_rows(layers[name], inputs[0]))

    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _bases(layer: SubspaceLinear, moments: InputMoments, mode: StepActivation, epsilon: float) -> Bases:
    feature = PrincipalAxes.of(moments.feature)
    token = PrincipalAxes.of(moments.token) if mode == "feature+token" else None
    ranks = ranks_by_energy(
        ModeEnergies(
            in_features=layer.in_features,
            tokens=moments.token_count or 1,
            feature=None if feature is None else feature.values.numpy(),
            token=None if token is None else token.values.numpy(),
        ),
        epsilon,
    )
    return Bases(_leading(feature, ranks.feature), _leading(token, ranks.token))


def _leading(axes: PrincipalAxes | None, rank: int | None) -> Tensor | None:
    return None if axes is None or rank is None else axes.vectors[:, :rank].float().contiguous()
