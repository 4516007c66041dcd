"""Pooling of aten and its gradients in ONNX.

mean       the gradient of a pixel is the sum of dY over the windows that hold it, each divided by the size
           of the window: the transposed convolution of what is divided, with filters of ones
largest    dY is added at the place that each window took its number from
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from wasi_export.converters.step_graph.lowering import Lowering, Written, lowers, size_of
from wasi_export.converters.translation import pair_of
from wasi_export.errors import UnsupportedModelError

aten = torch.ops.aten


@lowers(aten.avg_pool2d.default)
def _avg_pool(
    w: Lowering,
    node: fx.Node,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil: bool = False,
    count_padding: bool = True,
    divisor: int | None = None,
) -> ir.Value:
    if divisor is not None:
        raise UnsupportedModelError(f"it has no form with a divisor of its own, got {divisor}")
    kernel, pads = pair_of(kernel), pair_of(padding)
    return w.op(
        "AveragePool", w[x], kernel_shape=kernel, strides=pair_of(stride or kernel), pads=[*pads, *pads],
        ceil_mode=int(ceil), count_include_pad=int(count_padding),
    )  # fmt: skip


@lowers(aten.avg_pool2d_backward.default)
def _avg_pool_backward(
    w: Lowering,
    node: fx.Node,
    dy: fx.Node,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    count_padding: bool,
    divisor: int | None,
) -> ir.Value:
    kernel, pads = pair_of(kernel), pair_of(padding)
    stride = pair_of(stride or kernel)
    image, out = (list(map(int, size_of(t)[2:])) for t in (x, dy))
    axes = list(zip(image, out, kernel, stride, pads, strict=True))
    counts = [_counts(*axis, count_padding=count_padding) for axis in axes]
    share = 1 / np.outer(*counts) if divisor is None else np.full(out, 1 / divisor)
    one_channel = w.op("Reshape", w[dy], w.ints(-1, 1, *out))
    shared = w.op("Mul", one_channel, w.builder.constant(share[None, None].astype(np.float32)))
    left_over = [n + 2 * p - k - s * (o - 1) for n, o, k, s, p in axes]
    ends = [p - min(rest, 0) for p, rest in zip(pads, left_over, strict=True)]
    dx = w.op(
        "ConvTranspose", shared, w.builder.constant(np.ones((1, 1, *kernel), np.float32)), strides=stride,
        pads=[*pads, *ends], output_padding=[max(rest, 0) for rest in left_over],
    )  # fmt: skip
    return w.op("Reshape", dx, w.shape(size_of(node)))


def _counts(size: int, windows: int, kernel: int, stride: int, pad: int, *, count_padding: bool) -> Any:
    """Returns by how many numbers the sum of each window is divided, along one axis."""
    starts = np.arange(windows) * stride - pad
    ends = np.minimum(starts + kernel, size + pad)
    return ends - starts if count_padding else np.minimum(ends, size) - np.maximum(starts, 0)


@lowers(aten.max_pool2d_with_indices.default)
def _max_pool(
    w: Lowering,
    node: fx.Node,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil: bool = False,
) -> Written:
    """The places are counted from the first pixel of the batch in ONNX, from that of the channel in aten."""
    kernel, pads = pair_of(kernel), pair_of(padding)
    largest, places = w.builder.op_multi_out(
        "MaxPool", [w[x]], outputs=2, kernel_shape=kernel, strides=pair_of(stride or kernel),
        pads=[*pads, *pads], dilations=pair_of(dilation), ceil_mode=int(ceil),
    )  # fmt: skip
    height, width = size_of(x)[2:]
    return [largest, w.op("Mod", places, w.ints(int(height) * int(width)))]


@lowers(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(
    w: Lowering,
    node: fx.Node,
    dy: fx.Node,
    x: fx.Node,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
    places: fx.Node,
) -> ir.Value:
    image, out = (int(a) * int(b) for a, b in (size_of(x)[2:], size_of(dy)[2:]))
    rows = w.op("Reshape", w[places], w.ints(-1, out))
    zeros = w.op("Mul", w.op("Reshape", w[x], w.ints(-1, image)), w.operand(0.0, torch.float32))
    found = w.op(
        "ScatterElements", zeros, rows, w.op("Reshape", w[dy], w.ints(-1, out)), axis=1, reduction="add"
    )
    return w.op("Reshape", found, w.shape(size_of(node)))
