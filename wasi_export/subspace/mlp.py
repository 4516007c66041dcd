"""An MLP of two factored layers that keeps rank-K codes in place of its hidden layer; exact.

    z1 = X·right1ᵀ              (T, K1)     kept
    h  = z1·left1ᵀ + bias1      (T, H)      made again, some rows at a time
    a  = act(h)                 (T, H)      made again
    z2 = a·right2ᵀ              (T, K2)     kept
    Y  = z2·left2ᵀ + bias2      (T, O)

    dLeft2 = dYᵀ·z2     g = dY·left2    dRight2 = gᵀ·a     dh = (g·right2) ∘ act'(h)
    dLeft1 = dhᵀ·z1     dz1 = dh·left1                     dBias1 = Σ dh,  dBias2 = Σ dY

Kept are T·(K1 + K2) numbers, against T·2H for h and a; the price is one product of T·K1·H multiply-adds and
the activation function. What becomes of X in z1 = X·right1ᵀ is the first layer's business.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from wasi_export.subspace.autocast import AutocastSetting
from wasi_export.subspace.chunks import chunks
from wasi_export.subspace.linear import SubspaceLinear

ROWS = 512
"""Rows of the hidden layer that exist at a time: 3 MB at a width of 1536, so that they stay in the cache."""

Activation = Callable[[Tensor], Tensor]


def factored_mlp(x: Tensor, fc1: SubspaceLinear, act: Activation, fc2: SubspaceLinear) -> Tensor:
    """Returns fc2(act(fc1(x))) for x (…, I), without keeping what is inside.

    Args:
        x: the input.
        fc1: its input is kept as the layer itself keeps it.
        act: acts on every number alone, and has no parameters.
        fc2: of its input only the code z2 is kept, whatever its activation ranks are.
    """
    return cast(
        Tensor,
        _FactoredMlpTail.apply(_code(fc1, x), fc1.left, fc1.bias, fc2.right, fc2.left, fc2.bias, act),
    )


class _FactoredMlpTail(torch.autograd.Function):
    """Y from z1 (…, K1)."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        left1: Tensor,
        bias1: Tensor | None,
        right2: Tensor,
        left2: Tensor,
        bias2: Tensor | None,
        act: Activation,
    ) -> Tensor:
        flat = z1.reshape(-1, z1.shape[-1])
        z2 = flat.new_empty(len(flat), len(right2))
        for rows in chunks(flat, ROWS):
            z2[rows] = F.linear(act(F.linear(flat[rows], left1, bias1)), right2)
        ctx.act, ctx.autocast = act, AutocastSetting.of(z1)
        ctx.save_for_backward(z1, z2, left1, bias1, right2, left2)
        return F.linear(z2, left2, bias2).reshape(*z1.shape[:-1], len(left2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.autocast.again():
            return _FactoredMlpTail._gradients(ctx, grad_output)

    @staticmethod
    def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, left1, bias1, right2, left2 = ctx.saved_tensors
        needs_z1, needs_left1, needs_bias1, needs_right2, needs_left2, needs_bias2, _ = ctx.needs_input_grad
        dY, flat = grad_output.reshape(-1, len(left2)), z1.reshape(-1, z1.shape[-1])
        G = dY @ left2
        grad_left2 = dY.T @ z2 if needs_left2 else None
        grad_bias2 = dY.sum(0) if needs_bias2 else None
        grad_z1 = torch.empty_like(flat) if needs_z1 else None
        grad_left1 = torch.zeros_like(left1) if needs_left1 else None
        grad_bias1 = torch.zeros_like(bias1) if needs_bias1 else None
        grad_right2 = torch.zeros_like(right2) if needs_right2 else None
        for rows in chunks(flat, ROWS):
            h = F.linear(flat[rows], left1, bias1).requires_grad_()
            with torch.enable_grad():
                a = ctx.act(h)
            (dh,) = torch.autograd.grad(a, h, G[rows] @ right2)
            if grad_right2 is not None:
                grad_right2 += G[rows].T @ a.detach()
            if grad_left1 is not None:
                grad_left1 += dh.T @ flat[rows]
            if grad_bias1 is not None:
                grad_bias1 += dh.sum(0)
            if grad_z1 is not None:
                grad_z1[rows] = dh @ left1
        grad_z1 = None if grad_z1 is None else grad_z1.reshape(z1.shape)
        return grad_z1, grad_left1, grad_bias1, grad_right2, grad_left2, grad_bias2, None


def _code(layer: SubspaceLinear, x: Tensor) -> Tensor:
    """Returns x·rightᵀ (…, K) by the layer itself, so that it keeps x in the form it is set to."""
    ranks = layer.activation
    if ranks.feature is None and ranks.token is None and ranks.batch is None:
        return F.linear(x, layer.right)
    without_left = {"left": torch.eye(layer.rank, dtype=x.dtype, device=x.device)}
    if layer.bias is not None:
        without_left["bias"] = x.new_zeros(layer.rank)
    return cast(Tensor, functional_call(layer, without_left, (x,)))
