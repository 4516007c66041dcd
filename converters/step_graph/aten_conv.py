"""Convolutions of aten and their gradients in ONNX.

dX    the transposed convolution of dY
dW    the convolution of X with dY as filters, the batch as their channels
"""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from wasi_export.converters.step_graph.lowering import Lowering, Written, lowers, size_of
from wasi_export.errors import UnsupportedModelError

aten = torch.ops.aten


@lowers(aten.convolution.default)
def _convolution(
    w: Lowering,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> ir.Value:
    _check(x, transposed)
    inputs = [w[x], w[weight], *([] if bias is None else [w[bias]])]
    pads = [*padding, *padding]
    return w.op("Conv", *inputs, strides=stride, pads=pads, dilations=dilation, group=groups)


@lowers(aten.convolution_backward.default)
def _convolution_backward(
    w: Lowering,
    node: fx.Node,
    dy: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Written:
    _check(x, transposed)
    image, kernel, out = (list(map(int, size_of(t)[2:])) for t in (x, weight, dy))
    dx = dweight = dbias = None
    # Rows and columns that no filter reaches, as the stride does not divide the rest.
    left_over = [
        n + 2 * p - (d * (k - 1) + 1) - s * (o - 1)
        for n, p, d, k, s, o in zip(image, padding, dilation, kernel, stride, out, strict=True)
    ]
    if wanted[0]:
        dx = w.op(
            "ConvTranspose", w[dy], w[weight], strides=stride, pads=[*padding, *padding],
            dilations=dilation, group=groups, output_padding=left_over,
        )  # fmt: skip
    if wanted[1]:
        dweight = _filter_gradient(w, dy, x, groups, stride, padding, dilation, left_over)
    if wanted[2]:
        dbias = w.op("ReduceSum", w[dy], w.ints(0, 2, 3), keepdims=0)
    return [dx, dweight, dbias]


def _filter_gradient(
    w: Lowering,
    dy: fx.Node,
    x: fx.Node,
    groups: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    left_over: Sequence[int],
) -> ir.Value:
    """Returns the gradient [O, I/groups, h, w]: X as an image of B channels, dY as filters of B channels.

    With groups, the image has the channels of one group on the axis of the batch and the groups, times the
    batch, on that of the channels.
    """
    batch_first = [1, 0, 2, 3]
    channels, height, width = size_of(x)[1:]
    ends = [p - r for p, r in zip(padding, left_over, strict=True)]
    if min(ends) < 0:  # what no filter reached is cut off
        cut = [n - max(0, -e) for n, e in zip((height, width), ends, strict=True)]
        image = w.op("Slice", w[x], w.ints(0, 0), w.ints(*map(int, cut)), w.ints(2, 3))
        height, width = cut
        ends = [max(0, e) for e in ends]
    else:
        image = w[x]
    pads = [*padding, *ends]
    if groups == 1:
        image, filters = (w.op("Transpose", t, perm=batch_first) for t in (image, w[dy]))
    else:
        inner = int(channels) // groups
        image = w.op("Reshape", image, w.ints(-1, groups, inner, int(height), int(width)))
        image = w.op("Transpose", image, perm=[2, 1, 0, 3, 4])
        image = w.op("Reshape", image, w.ints(inner, -1, int(height), int(width)))
        filters = w.op("Transpose", w[dy], perm=batch_first)
    found = w.op("Conv", image, filters, strides=dilation, dilations=stride, pads=pads, group=groups)
    return w.op("Transpose", found, perm=batch_first)


def _check(x: fx.Node, transposed: bool) -> None:
    if transposed or len(size_of(x)) != 4:
        kind = "transposed" if transposed else f"{len(size_of(x)) - 2}-dimensional"
        raise UnsupportedModelError(f"it has a form on images only, and not transposed; this one is {kind}")
