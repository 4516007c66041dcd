"""Inputs of factored layers that are kept for the backward pass as coefficients in a basis, not whole.

An input X (B, N, I) is kept as core S in orthonormal bases U (I×r) of features and V (N×s) of tokens, or of
features alone. Both are state of the step: given, and given back one round of subspace iteration further,

    Z  = X·U              S  = Z ×₂ Vᵀ               kept: S; without tokens Z is kept
    M  = Σ xᵀ·z           U' = orth(M)               M: over all rows x of X and z of Z
    M₂ = Σ_b Z_b·S_bᵀ     V' = orth(M₂)

The gradients are those of `subspace.autograd`, which is what training runs. Three choices:

The bases of a step are those that it is given, so its own input has no part in them (in training a basis
moves before it is used, in every eighth step). One product less, X is not held until a basis is orthonormal,
and M adds up over the parts of a batch. They begin as the leading axes of real inputs (`first_bases.py`).

The barrier: nothing needs S until the backward pass, and M until its end, so a runtime would make them then,
and keep X for it. The output is made to wait for M, which is made of Z (and M₂ of S). Where blocks are
computed again nothing is to be kept of the first pass, so there it is S that waits for M.

The batch has no basis: it keeps its size open.

Source: arXiv 2510.09160 section 3.2.
"""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from wasi_export.converters.step_graph.barrier import after
from wasi_export.subspace.autograd import SubspaceLinearFunction, WeightGradient
from wasi_export.subspace.conv import SubspaceConv1x1, input_rows
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.tucker import Bases

FEATURE, TOKEN = "feature_basis", "token_basis"


@dataclass
class Sink:
    """Takes the gradient of a weight that a backward pass makes."""

    weight_gradient: WeightGradient | None = None


@dataclass
class Kept:
    """What the layers tell of a step beside their outputs."""

    moments: dict[str, Tensor] = field(default_factory=dict)
    """M and M₂ by the names of their bases, of the last pass: the one that is differentiated."""
    sinks: dict[str, Sink] = field(default_factory=dict)
    """By layer, for those whose weight is to have a gradient in place of its factors."""


def basis_tensors(bases: Mapping[str, Bases]) -> dict[str, Tensor]:
    """Returns the bases of layers by the names of the tensors."""
    found: dict[str, Tensor] = {}
    for layer, of in bases.items():
        parts = ((FEATURE, of.feature), (TOKEN, of.token))
        found |= {f"{layer}.{part}": basis for part, basis in parts if basis is not None}
    return found


@contextmanager
def compressing(
    layers: Mapping[str, SubspaceLinear],
    tensors: Mapping[str, Tensor],
    kept: Kept,
    recomputed: Set[nn.Module],
) -> Iterator[None]:
    """Makes layers keep their inputs in bases, in place, while the context lasts.

    Args:
        layers: that have bases, by name.
        tensors: with the bases, as `basis_tensors` names them.
        kept: to write to.
        recomputed: of these, what a first pass makes is not kept.
    """
    try:
        for name, layer in layers.items():
            bases = Bases(tensors.get(f"{name}.{FEATURE}"), tensors.get(f"{name}.{TOKEN}"))
            early = layer not in recomputed
            layer.forward = partial(_forward, layer, name, bases, kept, early)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _forward(layer: SubspaceLinear, name: str, bases: Bases, kept: Kept, early: bool, x: Tensor) -> Tensor:
    rows = input_rows(layer, x)
    with torch.no_grad():
        core, moments = compress(rows, bases)
    kept.moments |= {f"{name}.{part}": moment for part, moment in moments.items()}
    bias: Tensor | None = layer.bias
    if early:
        bias = after(rows.new_zeros(layer.out_features) if bias is None else bias, *moments.values())
    else:
        core = after(core, *moments.values())
    y: Tensor = SubspaceLinearFunction.apply(
        rows, layer.left, layer.right, bias, core, bases.feature, bases.token, None, kept.sinks.get(name)
    )
    return y.permute(0, 3, 1, 2) if isinstance(layer, SubspaceConv1x1) else y


def compress(x: Tensor, bases: Bases) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the core of an input (B, …, I), and the moments of its bases by `FEATURE` and `TOKEN`."""
    core, moments = x, {}
    if bases.feature is not None:
        core = x @ bases.feature
        moments[FEATURE] = x.flatten(0, -2).T @ core.flatten(0, -2)
    if bases.token is not None:
        rows = core.flatten(1, -2)
        core = torch.einsum("bnr,nm->bmr", rows, bases.token)
        moments[TOKEN] = torch.einsum("bnr,bmr->nm", rows, core)
    return core, moments
