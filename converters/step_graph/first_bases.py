"""The bases that a step begins with: the leading axes of the inputs of its layers, for some real images.

As many of each mode as hold a share of its energy (`subspace.activation_ranks`). Zeros are no start for a
subspace iteration, and a basis that the first batch would have to make is one more state to tell apart; the
images that a bundle is checked with are at hand, and their bases travel with it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from wasi_export.config import StepActivation
from wasi_export.subspace import subspace_layers
from wasi_export.subspace.activation_ranks import ModeEnergies, ranks_by_energy
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.moments import (
    InputMoments,
    PrincipalAxes,
    collect_moments,
    leading_axes,
    mode_energies,
)
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
        model: as it is exported; left in the mode it was in.
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
    moments = collect_moments(model, layers, [torch.from_numpy(images)], total=1)
    found = {name: _bases(layers[name], moments[name], mode, epsilon) for name in layers}
    return {name: bases for name, bases in found.items() if bases != Bases()}


def _bases(layer: SubspaceLinear, moments: InputMoments, mode: StepActivation, epsilon: float) -> Bases:
    feature = PrincipalAxes.of(moments.feature)
    token = PrincipalAxes.of(moments.token) if mode == "feature+token" else None
    ranks = ranks_by_energy(
        ModeEnergies(
            in_features=layer.in_features,
            tokens=moments.token_count or 1,
            feature=mode_energies(feature),
            token=mode_energies(token),
        ),
        epsilon,
    )
    return Bases(leading_axes(feature, ranks.feature), leading_axes(token, ranks.token))
