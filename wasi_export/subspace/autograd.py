"""Forward and backward of a factored Linear whose input is kept compressed.

    Z = X·rightᵀ            (…, K)
    Y = Z·leftᵀ + bias      (…, O)

Saved for backward: the Tucker core of X and its bases, the two factors. Neither X, nor Z, nor anything of
shape O×I. With X̃ = P·Uᵀ the activation the core stands for (P its token-expanded core, U its feature basis):

    Ḡ      = dY·left                (…, K)
    dX     = Ḡ·right                exact
    dBias  = Σ dY                   exact
    dRight = Ḡᵀ·X̃ = (Ḡᵀ·P)·Uᵀ      (K, I)
    dLeft  = dYᵀ·(X̃·rightᵀ) = dYᵀ·(P·(right·U)ᵀ)    (O, K)

So the gradient of the factors is the exact gradient at X̃, and the error of compression goes nowhere else.

The `wsi` rule wants the gradient of the weight in place of those of the factors. It is dYᵀ·X̃ = (dYᵀ·P)·Uᵀ:
of the rank of U, and in that form it is never of shape O×I (`WeightGradient`).

Source: arXiv 2510.09160 eq. 8-10, written for the factors themselves in place of the dense weight.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from wasi_export.subspace.autocast import AutocastSetting
from wasi_export.subspace.precision import at_least_fp32
from wasi_export.subspace.tucker import Bases, expand_tokens


@dataclass(frozen=True)
class WeightGradient:
    """The gradient of a weight, G = coefficients·basisᵀ; ‖G‖ is that of the coefficients."""

    coefficients: Float[Tensor, "d_out r"]
    basis: Float[Tensor, "d_in r"]
    """With orthonormal columns."""

    def add(self, other: "WeightGradient") -> "WeightGradient":
        """Returns the sum; where the bases differ it has the columns of both, as many as the weight has."""
        if other.basis is self.basis:
            return WeightGradient(self.coefficients + other.coefficients, self.basis)
        Q, R = torch.linalg.qr(torch.cat((self.basis, other.basis), 1))
        return WeightGradient(torch.cat((self.coefficients, other.coefficients), 1) @ R.T, Q)


@runtime_checkable
class GradientSink(Protocol):
    """Takes the gradients of a weight that backward passes make."""

    weight_gradient: WeightGradient | None


class SubspaceLinearFunction(torch.autograd.Function):
    """y = (x·rightᵀ)·leftᵀ + bias, saving a given core and bases in place of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        core: Tensor,
        feature: Tensor | None,
        token: Tensor | None,
        batch: Tensor | None = None,
        sink: GradientSink | None = None,
    ) -> Tensor:
        """Returns y (…, O) for x (…, I).

        `core` is what `compress` made of x in the bases. A sink gets the gradient of the weight, and the
        factors get none; it needs a feature basis.
        """
        ctx.sink, ctx.autocast = sink, AutocastSetting.of(x)
        ctx.save_for_backward(left, right, core, feature, token, batch)
        return F.linear(F.linear(x, right), left, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, left, right and bias."""
        with ctx.autocast.again():
            return *SubspaceLinearFunction._gradients(ctx, grad_output), None, None, None, None, None

    @staticmethod
    def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        left, right, core, feature, token, batch = ctx.saved_tensors
        needs_x, needs_left, needs_right, needs_bias = ctx.needs_input_grad[:4]
        dY = grad_output.reshape(-1, grad_output.shape[-1])
        G = dY @ left  # (T, K): cheap, and both dX and dRight need it
        grad_x = grad_left = grad_right = grad_bias = None
        if needs_x:
            grad_x = (G @ right).reshape(*grad_output.shape[:-1], right.shape[1])
        if needs_left or needs_right:
            P = expand_tokens(core, Bases(feature, token, batch))
            P = P.reshape(-1, P.shape[-1])
            if ctx.sink is not None:
                found = WeightGradient(at_least_fp32(dY.T @ P), feature)
                known = ctx.sink.weight_gradient
                ctx.sink.weight_gradient = found if known is None else known.add(found)
                needs_left = needs_right = False
            if needs_right:
                grad_right = G.T @ P
                grad_right = grad_right if feature is None else grad_right @ feature.T
            if needs_left:
                projected = right if feature is None else right @ feature
                # (dYᵀ·P)·projectedᵀ costs r·(T·O + O·K); the other order T·K·(r + O). Both are exact.
                T, O, K, r = P.shape[0], dY.shape[1], left.shape[1], P.shape[1]
                if r * (T * O + O * K) < T * K * (r + O):
                    grad_left = (dY.T @ P) @ projected.T
                else:
                    grad_left = dY.T @ (P @ projected.T)
        if needs_bias:
            grad_bias = dY.sum(0)
        return grad_x, grad_left, grad_right, grad_bias
