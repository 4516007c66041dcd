"""Factors that any optimiser moves, with `left` brought back to orthonormal columns.

W = left·right has many pairs of factors: left·M⁻¹ and M·right are the same weight for every invertible M. An
optimiser drifts among them, and how far a step moves W depends on where it is. So the pair is brought back:

    left = Q·M                     (QR, each column of Q along its old direction)
    left' = Q,  right' = M·right   the same weight

The optimiser's state goes with it. For any loss f(left·right), as left = left'·M and right = M⁻¹·right',

    ∂f/∂left' = ∂f/∂left·Mᵀ        ∂f/∂right' = M⁻ᵀ·∂f/∂right

and a mean of gradients moves as they do, exactly:

    m_left ← m_left·Mᵀ             m_right ← M⁻ᵀ·m_right

A mean of squares does not follow from the old one alone: (g·Mᵀ)ᵢⱼ² = Σ_kl gᵢₖ·gᵢₗ·Mⱼₖ·Mⱼₗ holds products
that were not kept. With those taken for zero, as uncorrelated entries have them, it is, with squares taken
entry by entry,

    v_left ← v_left·(M∘M)ᵀ         v_right ← (M⁻ᵀ∘M⁻ᵀ)·v_right

which stays positive and is exact for a diagonal M. Between two such moves M is nearly the identity, and so is
the error. A `left` that lost its rank has no M⁻¹: the moments become infinite, and the next loss tells.

Source: moments carried over between factors, arXiv 2410.20625 (LoRA-RITE) and 2410.16103 (LDAdam); here for a
change of basis within the factors, where the first moment is exact.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.profiler import record_function

from wasi_export.errors import ConfigError
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.precision import at_least_fp32
from wasi_export.subspace.tucker import orthonormalize

GAUGE_PERIOD = 8
"""Steps of a layer from one orthonormal `left` to the next. In each step the QRs and products of a ViT-S/14
took up to a tenth of a training step of 32 images; in eight steps `left` hardly moves."""

GAUGED_OPTIMIZERS = (
    "adam", "adamp", "adamw", "lamb", "lion", "momentum", "nadam", "nadamw", "nesterov", "nesterovw", "radam",
    "radamw", "sgd", "sgdw",
)  # fmt: skip
"""timm's optimisers that keep nothing of a factor but means of its gradient and of its square (tests)."""

_MEANS = ("exp_avg", "momentum_buffer")
_SQUARES = ("exp_avg_sq",)


def fix_gauge(
    left: Float[Tensor, "d_out rank"], right: Float[Tensor, "rank d_in"]
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"], Float[Tensor, "rank rank"]]:
    """Returns left' with orthonormal columns, right' with the same product, and M."""
    Q = orthonormalize(left)
    M = Q.T @ left
    return Q, M @ right, M


class GaugeFix:
    """Keeps `left` of factored layers orthonormal, after the steps of the optimiser that moves them."""

    def __init__(self, layers: Mapping[str, SubspaceLinear], opt: str, *, period: int = GAUGE_PERIOD) -> None:
        """Makes it for layers by name.

        Args:
            layers: whose factors the optimiser holds.
            opt: timm's name of the optimiser.
            period: steps from one move to the next.

        Raises:
            ConfigError: the state of that optimiser cannot be carried over.
        """
        if opt.lower() not in GAUGED_OPTIMIZERS:
            raise ConfigError(
                'update = "factors" moves the optimizer\'s state with the factors, and does not know that of '
                f'opt = {opt!r}: choose one of {", ".join(GAUGED_OPTIMIZERS)}, or update = "right"'
            )
        self._layers, self._period = tuple(layers.values()), period

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the steps of the optimiser keep `left` orthonormal, in place."""
        optimizer.register_step_post_hook(self._step)

    @torch.no_grad()
    def _step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Counts the step for the layers that took it, and moves those whose turn it is."""
        for layer in self._layers:
            if layer.left.grad is None:  # a step may be of some layers only
                continue
            state = optimizer.state[layer.left]
            state["gauge_step"] = state.get("gauge_step", 0) + 1
            if state["gauge_step"] % self._period == 0:
                _move(layer, state, optimizer.state[layer.right])


def _move(layer: SubspaceLinear, left_state: dict[str, Any], right_state: dict[str, Any]) -> None:
    """Fixes the gauge of a layer and moves the state of its factors, in place."""
    with record_function("wasi.gauge"):
        _carry_over(layer, left_state, right_state)


def _carry_over(layer: SubspaceLinear, left_state: dict[str, Any], right_state: dict[str, Any]) -> None:
    left, right, M = fix_gauge(at_least_fp32(layer.left), at_least_fp32(layer.right))
    layer.left.copy_(left)
    layer.right.copy_(right)
    inverse, _ = torch.linalg.inv_ex(M.T)
    for names, on_left, on_right in ((_MEANS, M.T, inverse), (_SQUARES, M.T.square(), inverse.square())):
        for name in names:
            if left_state.get(name) is not None:
                left_state[name].copy_(at_least_fp32(left_state[name]) @ on_left)
            if right_state.get(name) is not None:
                right_state[name].copy_(on_right @ at_least_fp32(right_state[name]))
