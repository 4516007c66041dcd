"""A dense Linear layer whose input is kept compressed: the method ASI, without factored weights.

    Y  = X·Wᵀ + bias                    exact
    dX = dY·W                           exact
    dW = dYᵀ·X̃ = (dYᵀ·P)·Uᵀ             X̃ = P·Uᵀ: what the core of X stands for

U is the feature basis, P the core with its tokens expanded (`wasi_export/subspace/tucker.py`). The gradient
of the weight is O×I, and so is what the optimiser keeps of it: that is what WASI adds factors for.

Source: arXiv 2505.05086 (ASI), without the batch mode.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wasi_export.ranks import ActivationRanks, Plan
from wasi_export.subspace.linear import BASIS_PERIOD
from wasi_export.subspace.tucker import Bases, compress, expand_tokens, follow


class CompressedLinear(nn.Module):
    """y = x·Wᵀ + bias; the bases move as often as those of `SubspaceLinear`."""

    feature_basis: Tensor | None
    token_basis: Tensor | None
    passes: Tensor

    def __init__(self, linear: nn.Linear, ranks: ActivationRanks) -> None:
        """Takes weight and bias of a layer over; its bases start with the first axes."""
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        sizes = ((linear.in_features, ranks.feature), (ranks.token_count, ranks.token))
        for name, (size, rank) in zip(("feature_basis", "token_basis"), sizes, strict=True):
            self.register_buffer(name, None if size is None or rank is None else torch.eye(size, rank))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Returns y (…, O) for x (…, I)."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.linear(x, self.weight, self.bias)
        with torch.no_grad():
            bases = Bases(self.feature_basis, self.token_basis)
            if self.passes % BASIS_PERIOD == 0 or not bases.fit(x):
                bases = follow(x, bases)
                self.feature_basis, self.token_basis = bases.feature, bases.token
            self.passes += 1
            core = compress(x, bases)
        y = _CompressedLinearFunction.apply(x, self.weight, self.bias, core, bases.feature, bases.token)
        return cast(Tensor, y)


class _CompressedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        core: Tensor,
        feature: Tensor | None,
        token: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, core, feature, token)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, core, feature, token = ctx.saved_tensors
        grad_x = grad_output @ weight if ctx.needs_input_grad[0] else None
        dY = grad_output.reshape(-1, grad_output.shape[-1])
        P = expand_tokens(core, Bases(feature, token))
        grad_weight = dY.T @ P.reshape(-1, P.shape[-1])
        if feature is not None:
            grad_weight = grad_weight @ feature.T
        grad_bias = dY.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


@torch.no_grad()
def compress_inputs(model: nn.Module, plan: Plan, starts: Mapping[str, Bases] | None = None) -> None:
    """Makes the Linear layers of a plan keep their inputs in its activation ranks, in place.

    Args:
        model: with dense layers.
        plan: the layers with a rank are taken, in their activation ranks; the rank itself is not read.
        starts: where the bases start, by layer; None: at the first axes.
    """
    for decision in plan.factored:
        linear = model.get_submodule(decision.name)
        assert isinstance(linear, nn.Linear), decision.name
        layer = CompressedLinear(linear, decision.activation)
        start = None if starts is None else starts.get(decision.name)
        if start is not None:
            for basis, axes in ((layer.feature_basis, start.feature), (layer.token_basis, start.token)):
                if basis is not None and axes is not None:
                    basis.copy_(axes[:, : basis.shape[1]])
        model.set_submodule(decision.name, layer.train(linear.training))
