"""The `wsi` rule in a graph: a step of gradient descent on a weight W = L·R, done on its factors.

It is that of `subspace.update`, where the algebra is. With the gradient G = C·Bᵀ, of the basis B in which the
layer's input is kept, c = 1 - η·λ and momentum μ as a difference of iterates, ρ = μ·η/η₋,

    W⁺ = s·L·R + Σ Cᵢ·Bᵢᵀ      s = c + ρ;  C₁·B₁ᵀ = -η·G,  C₂·B₂ᵀ = -ρ·L₋·(c₋·R₋)

    V  = orth(s·Rᵀ·(Lᵀ·L) + Σ Bᵢ·(Cᵢᵀ·L))
    P  = orth(s·L·(R·V) + Σ Cᵢ·(Bᵢᵀ·V))
    T  = orth(Pᵀ·L)                                   the basis of the columns of P that is nearest to L
    R' = s·Tᵀ·(Pᵀ·L)·R + Σ Tᵀ·(Pᵀ·Cᵢ)·Bᵢᵀ
    L' = P·T

The gradient could be had without a basis, from X and dY, but not be clipped: its norm is known after the
whole backward pass, V depends on it, and until then X and dY of all layers would have to be kept. C is all
that is kept of a layer, ‖C‖ = ‖G‖, and it adds up over the parts of a batch.

R' is written with P and T, so that L is not read after L' is there; the old factors are put away before the
new ones are written: see `in_place.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wasi_export.converters.step_graph.barrier import after
from wasi_export.converters.step_graph.optimizers import Rates
from wasi_export.converters.step_graph.orthonormal import orthonormalize

LAST_LR = "optimizer.last_lr"
"""State: η₋ of a rate of one."""
WEIGHT, LEFT, RIGHT, PREVIOUS = "weight", "left", "right", "previous"


@dataclass(frozen=True)
class WeightStep:
    """G = coefficients·basisᵀ of a layer, after clipping."""

    coefficients: Tensor
    basis: Tensor


def initial_state(
    layers: Sequence[str], parameters: Mapping[str, Tensor], momentum: float
) -> dict[str, Tensor]:
    """Returns the state before the first step: zeros; none without momentum."""
    if not momentum or not layers:
        return {}
    factors = [f"{layer}.{part}" for layer in layers for part in (LEFT, RIGHT)]
    state = {f"{name}.{PREVIOUS}": torch.zeros_like(parameters[name]) for name in factors}
    return state | {LAST_LR: torch.zeros(())}


def update(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, WeightStep],
    state: Mapping[str, Tensor],
    rates: Mapping[str, Rates],
    *,
    lr: Tensor,
    decay: Tensor,
    momentum: float,
) -> dict[str, Tensor]:
    """Returns the new factors and the new state, under the names of the old ones.

    Args:
        parameters: by name.
        gradients: by layer.
        state: of the rule.
        rates: by the names of parameters; that of `left` counts.
        lr: of the step, a scalar.
        decay: of the step, a scalar.
        momentum: μ; 0 has no state.
    """
    new: dict[str, Tensor] = {}
    ratio = torch.zeros(())
    if momentum and gradients:
        last = state[LAST_LR]
        ratio = torch.where(last > 0, momentum * lr / last, 0.0)
        new[LAST_LR] = after(lr, ratio)
    for layer, gradient in gradients.items():
        names = f"{layer}.{LEFT}", f"{layer}.{RIGHT}"
        left, right = (parameters[name] for name in names)
        eta = lr * rates[names[0]].lr
        keep = 1 - eta * decay * rates[names[0]].decay
        terms = [(-eta * gradient.coefficients, gradient.basis)]
        if not momentum:
            new[names[0]], new[names[1]] = project(left, right, terms, keep)
            continue
        old = [f"{name}.{PREVIOUS}" for name in names]
        terms.append((-ratio * state[old[0]], state[old[1]].T))
        new_left, new_right = project(left, right, terms, keep + ratio)
        new[old[0]], new[old[1]] = after(left, new_right), after(keep * right, new_right)
        new[names[0]], new[names[1]] = after(new_left, new[old[0]]), after(new_right, new[old[1]])
    return new


def project(
    left: Tensor, right: Tensor, terms: Sequence[tuple[Tensor, Tensor]], scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the factors of W⁺ = scale·left·right + Σ C·Bᵀ after one round of subspace iteration.

    Args:
        left: [O, K], with columns that are orthonormal, or nearly so.
        right: [K, I].
        terms: C [O, r] and B [I, r] of what is added to the weight.
        scale: of the old weight, a scalar.
    """
    Q = scale * (right.T @ (left.T @ left))
    for change, basis in terms:
        Q = Q + basis @ (change.T @ left)
    V = orthonormalize(Q)
    W = scale * (left @ (right @ V))
    for change, basis in terms:
        W = W + change @ (basis.T @ V)
    P = orthonormalize(W)
    turned = P.T @ left
    T = orthonormalize(turned)
    new_right = scale * ((T.T @ turned) @ right)
    for change, basis in terms:
        new_right = new_right + (T.T @ (P.T @ change)) @ basis.T
    return P @ T, new_right
