"""How a torch operator becomes ONNX where torch's own translation would not do.

torch writes a Linear layer on [B, N, I] as MatMul(x, Transpose(weight)) + Add. Folding that Transpose gives
the weight another layout and no name; keeping it costs a copy of the weight every run and stops the runtime
from packing it. Here it becomes

    y = Reshape(Gemm(Reshape(x, [-1, I]), weight, bias, transB=1), [-1, N, O])

so that the file holds the parameter as torch has it, under torch's name, and no optimiser is needed.

A convolution without a bias gets a bias of zeros from torch, and its filters another user, which asks for
their number. Here it is one Conv, so that filters which are a view of a factor have no other use.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import FLOAT, opset18

op: Any = (
    opset18  # typed for tensors, called with values of a graph; these operators are the same up to opset 25
)


def translate_linear(x: FLOAT, weight: FLOAT, bias: FLOAT | None = None) -> FLOAT:
    """Returns x·weightᵀ + bias as a Gemm. x: [..., I], weight: [O, I], bias: [O]."""
    *leading, in_features = _sizes(x)
    out_features = _sizes(weight)[0]
    y: FLOAT  # as torch.onnx reads the signature; these are values of the graph being built
    if len(leading) == 1:
        y = op.Gemm(x, weight, bias, transB=1)
        return y
    rows = op.Gemm(op.Reshape(x, op.Constant(value_ints=[-1, in_features])), weight, bias, transB=1)
    rows.shape, rows.dtype = ir.Shape([None, out_features]), ir.DataType.FLOAT
    target = op.Constant(value_ints=[*leading, out_features])
    if leading.count(-1) > 1:
        target = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[out_features]), axis=0)
    y = op.Reshape(rows, target)
    return y


def translate_conv2d(
    x: FLOAT,
    weight: FLOAT,
    bias: FLOAT | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> FLOAT:
    """Returns a Conv. x: [B, I, H, W], weight: [O, I/groups, h, w], bias: [O]."""
    y: FLOAT = op.Conv(
        x,
        weight,
        bias,
        kernel_shape=_sizes(weight)[2:],
        strides=pair_of(stride),
        pads=[*pair_of(padding), *pair_of(padding)],
        dilations=pair_of(dilation),
        group=groups,
    )
    return y


def pair_of(sizes: Sequence[int]) -> list[int]:
    """Returns a size for each of the two axes; torch lets one stand for both."""
    return list(sizes) if len(sizes) == 2 else [*sizes, *sizes]


def _sizes(value: object) -> list[int]:
    """Returns the sizes of a value in the graph being built; -1 for those that are not static."""
    assert isinstance(value, ir.Value)
    assert value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape]


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.linear.default: translate_linear,
    torch.ops.aten.conv2d.default: translate_conv2d,
}
"""Torch operator → function that writes it in ONNX; the rest is torch's."""
