"""Operators of aten that are taken apart while a step is traced, where torch's own way would not do."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

aten = torch.ops.aten


def pad(x: Tensor, sides: Sequence[int], value: float = 0.0) -> Tensor:
    """Returns what torch.nn.functional.pad does; its own kernel asks for the batch as a number."""
    for place in range(len(sides) // 2):
        dim = x.ndim - 1 - place
        before, after = sides[2 * place : 2 * place + 2]
        if before < 0 or after < 0:
            x = x.narrow(dim, max(0, -before), x.shape[dim] + min(before, 0) + min(after, 0))
        left, right = (
            [x.new_full([*x.shape[:dim], n, *x.shape[dim + 1 :]], value)] if n > 0 else []
            for n in (before, after)
        )
        if left or right:
            x = torch.cat([*left, x, *right], dim)
    return x.clone()


def var(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Tensor:
    """Returns the variance, over count - correction; axes of the batch are not among them."""
    axes = list(range(x.ndim)) if not dim else list(dim)
    count = math.prod(x.shape[axis] for axis in axes) - (1 if correction is None else correction)
    centred = x - x.mean(axes, keepdim=True)
    return (centred * centred).sum(axes, keepdim=keepdim) / count


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Any,
    variance: Any,
    training: bool,
    *rest: float,
) -> Any:
    """Takes apart a norm by the statistics of what it norms, as of weights; others have a form in ONNX."""
    if not training:
        return NotImplemented
    axes, column = [0, *range(2, x.ndim)], [-1, *[1] * (x.ndim - 2)]
    m = x.mean(axes, keepdim=True)
    centred = x - m
    r = ((centred * centred).mean(axes, keepdim=True) + rest[1]).rsqrt()
    y = centred * r
    y = y if weight is None else y * weight.view(column)
    y = y if bias is None else y + bias.view(column)
    return y, m.view(-1), r.view(-1)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x normed by the statistics of groups of channels, [B, C, …], and these statistics, [B, G]."""
    rows = x.reshape(-1, groups, channels // groups * pixels)
    m = rows.mean(2, keepdim=True)
    centred = rows - m
    r = ((centred * centred).mean(2, keepdim=True) + eps).rsqrt()
    column = [-1, *[1] * (x.ndim - 2)]
    y = (centred * r).view(x.shape)
    y = y if weight is None else y * weight.view(column)
    y = y if bias is None else y + bias.view(column)
    return y, m.squeeze(2), r.squeeze(2)


def batch_norm_backward(*args: Any) -> Any:
    """Takes apart the gradient of the same norms."""
    return _batch_norm_backward(*args) if args[7] else NotImplemented


_batch_norm_backward = decomposition_table[aten.native_batch_norm_backward.default]
RULES: Mapping[Any, Callable[..., Any]] = {
    aten.constant_pad_nd.default: pad,
    aten.var.correction: var,
    aten.native_batch_norm.default: batch_norm,
    aten.native_group_norm.default: group_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
}
