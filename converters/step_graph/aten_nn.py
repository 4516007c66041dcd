"""Products, norms, activations and their gradients in ONNX, in as few passes over the data as there are.

With y = f(x) and dy the gradient of the loss by y:

    LayerNorm    dx = r·(g - mean(g) - x̂·mean(g·x̂)),  g = dy·γ,  x̂ = (x - μ)·r
    Softmax      dx = y·(dy - Σ dy·y)
    GELU         dx = dy·(Φ(x) + x·φ(x)),  Φ, φ: the normal distribution and its density
    SiLU         dx = dy·σ·(1 + x·(1 - σ)),  σ = sigmoid(x)
    convolution  dX: the transposed convolution of dY; dW: the convolution of X with dY as filters, the batch
                 as their channels
"""

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from wasi_export.converters.step_graph.lowering import Lowering, Written, dtype_of, lowers, size_of
from wasi_export.errors import UnsupportedModelError

aten = torch.ops.aten


@lowers(aten.mm.default)
def _mm(w: Lowering, node: fx.Node, a: fx.Node, b: fx.Node) -> ir.Value:
    return _gemm(w, a, b)


@lowers(aten.addmm.default)
def _addmm(
    w: Lowering, node: fx.Node, bias: fx.Node, a: fx.Node, b: fx.Node, *, beta: float = 1, alpha: float = 1
) -> ir.Value:
    assert beta == alpha == 1
    return _gemm(w, a, b, w[bias])


def _gemm(w: Lowering, a: fx.Node, b: fx.Node, *bias: ir.Value) -> ir.Value:
    """Returns a·b + bias; an operand that is a transposed matrix is not copied."""
    (x, trans_a), (y, trans_b) = _untransposed(a), _untransposed(b)
    return w.op("Gemm", w[x], w[y], *bias, transA=trans_a, transB=trans_b)


def _untransposed(x: fx.Node) -> tuple[fx.Node, int]:
    if x.target is aten.t.default or (x.target is aten.permute.default and list(x.args[1]) == [1, 0]):  # type: ignore[arg-type]
        inner = x.args[0]
        assert isinstance(inner, fx.Node)
        return inner, 1
    return x, 0


@lowers(aten.bmm.default)
def _bmm(w: Lowering, node: fx.Node, a: fx.Node, b: fx.Node) -> ir.Value:
    return w.op("MatMul", w[a], w[b])


@lowers(aten._softmax.default)
def _softmax(w: Lowering, node: fx.Node, x: fx.Node, dim: int, half_to_float: bool) -> ir.Value:
    return w.op("Softmax", w[x], axis=dim)


@lowers(aten._log_softmax.default)
def _log_softmax(w: Lowering, node: fx.Node, x: fx.Node, dim: int, half_to_float: bool) -> ir.Value:
    return w.op("LogSoftmax", w[x], axis=dim)


@lowers(aten._softmax_backward_data.default)
def _softmax_backward(
    w: Lowering, node: fx.Node, dy: fx.Node, y: fx.Node, dim: int, dtype: torch.dtype
) -> ir.Value:
    weighted = w.op("Mul", w[dy], w[y])
    total = w.op("ReduceSum", weighted, w.ints(dim), keepdims=1)
    return w.op("Sub", weighted, w.op("Mul", w[y], total))


@lowers(aten._log_softmax_backward_data.default)
def _log_softmax_backward(
    w: Lowering, node: fx.Node, dy: fx.Node, y: fx.Node, dim: int, dtype: torch.dtype
) -> ir.Value:
    total = w.op("ReduceSum", w[dy], w.ints(dim), keepdims=1)
    return w.op("Sub", w[dy], w.op("Mul", w.op("Exp", w[y]), total))


@lowers(aten.native_layer_norm.default)
def _layer_norm(
    w: Lowering,
    node: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    weight: fx.Node | None,
    bias: fx.Node | None,
    eps: float,
) -> Written:
    scale = w.op("Expand", w.operand(1.0, dtype_of(x)), w.ints(*shape)) if weight is None else w[weight]
    inputs = [w[x], scale, *([] if bias is None else [w[bias]])]
    return w.builder.op_multi_out("LayerNormalization", inputs, outputs=3, axis=-len(shape), epsilon=eps)


@lowers(aten.native_layer_norm_backward.default)
def _layer_norm_backward(
    w: Lowering,
    node: fx.Node,
    dy: fx.Node,
    x: fx.Node,
    shape: Sequence[int],
    mean: fx.Node,
    rstd: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    wanted: Sequence[bool],
) -> Written:
    rank, axes = len(size_of(x)), w.ints(*range(-len(shape), 0))
    rows = w.ints(*range(rank - len(shape)))
    normal = w.op("Mul", w.op("Sub", w[x], w[mean]), w[rstd])
    dx = dweight = dbias = None
    product = w.op("Mul", w[dy], normal)
    if wanted[0]:
        g = w[dy] if weight is None else w.op("Mul", w[dy], w[weight])
        moved = product if weight is None else w.op("Mul", g, normal)
        first = w.op("Sub", g, w.op("ReduceMean", g, axes, keepdims=1))
        second = w.op("Mul", normal, w.op("ReduceMean", moved, axes, keepdims=1))
        dx = w.op("Mul", w.op("Sub", first, second), w[rstd])
    if wanted[1]:
        dweight = w.op("ReduceSum", product, rows, keepdims=0)
    if wanted[2]:
        dbias = w.op("ReduceSum", w[dy], rows, keepdims=0)
    return [dx, dweight, dbias]


@lowers(aten.gelu.default)
def _gelu(w: Lowering, node: fx.Node, x: fx.Node, *, approximate: str = "none") -> ir.Value:
    return w.builder.gelu(w[x], tanh=approximate == "tanh")


@lowers(aten.gelu_backward.default)
def _gelu_backward(
    w: Lowering, node: fx.Node, dy: fx.Node, x: fx.Node, *, approximate: str = "none"
) -> ir.Value:
    value = w[x]

    def number(n: float) -> ir.Value:
        return w.operand(n, torch.float32)

    if approximate == "none":
        error = w.op("Erf", w.op("Mul", value, number(math.sqrt(0.5))))
        share = w.op("Add", w.op("Mul", error, number(0.5)), number(0.5))
        exponent = w.op("Mul", w.op("Mul", value, value), number(-0.5))
        density = w.op("Mul", w.op("Exp", exponent), number(1 / math.sqrt(2 * math.pi)))
        return w.op("Mul", w[dy], w.op("Add", share, w.op("Mul", value, density)))
    # y = x/2·(1 + t), t = tanh(u), u = a·x + b·x³
    a, b = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715
    square = w.op("Mul", value, value)
    u = w.op("Mul", value, w.op("Add", w.op("Mul", square, number(b)), number(a)))
    t = w.op("Tanh", u)
    slope = w.op("Mul", value, w.op("Add", w.op("Mul", square, number(3 * b)), number(a)))
    rest = w.op("Mul", w.op("Sub", number(1.0), w.op("Mul", t, t)), slope)
    both = w.op("Add", w.op("Add", t, number(1.0)), rest)
    return w.op("Mul", w[dy], w.op("Mul", both, number(0.5)))


@lowers(aten.sigmoid.default)
def _sigmoid(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
    return w.op("Sigmoid", w[x])


@lowers(aten.sigmoid_backward.default)
def _sigmoid_backward(w: Lowering, node: fx.Node, dy: fx.Node, y: fx.Node) -> ir.Value:
    rest = w.op("Sub", w.operand(1.0, torch.float32), w[y])
    return w.op("Mul", w[dy], w.op("Mul", w[y], rest))


@lowers(aten.silu.default)
def _silu(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
    return w.op("Mul", w[x], w.op("Sigmoid", w[x]))


@lowers(aten.silu_backward.default)
def _silu_backward(w: Lowering, node: fx.Node, dy: fx.Node, x: fx.Node) -> ir.Value:
    one, share = w.operand(1.0, torch.float32), w.op("Sigmoid", w[x])
    rest = w.op("Add", one, w.op("Mul", w[x], w.op("Sub", one, share)))
    return w.op("Mul", w[dy], w.op("Mul", share, rest))


@lowers(aten.tanh.default)
def _tanh(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
    return w.op("Tanh", w[x])


@lowers(aten.tanh_backward.default)
def _tanh_backward(w: Lowering, node: fx.Node, dy: fx.Node, y: fx.Node) -> ir.Value:
    rest = w.op("Sub", w.operand(1.0, torch.float32), w.op("Mul", w[y], w[y]))
    return w.op("Mul", w[dy], rest)


@lowers(aten.relu.default)
def _relu(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
    return w.op("Relu", w[x])


@lowers(aten.threshold_backward.default)
def _threshold_backward(w: Lowering, node: fx.Node, dy: fx.Node, y: fx.Node, threshold: float) -> ir.Value:
    zero = w.operand(0.0, torch.float32)
    return w.op("Where", w.op("Greater", w[y], w.operand(threshold, torch.float32)), w[dy], zero)


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
    if transposed:
        raise UnsupportedModelError(f"a transposed convolution has no form in a training graph: {node}")
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


@lowers(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(
    w: Lowering,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node,
    mean: fx.Node,
    variance: fx.Node,
    momentum: float,
    eps: float,
) -> Written:
    return [w.op("BatchNormalization", w[x], w[weight], w[bias], w[mean], w[variance], epsilon=eps)]


@lowers(aten.avg_pool2d.default)
def _avg_pool(
    w: Lowering, node: fx.Node, x: fx.Node, kernel: Sequence[int], stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0), *_: Any,
) -> ir.Value:  # fmt: skip
    pads = [*padding, *padding]
    return w.op("AveragePool", w[x], kernel_shape=kernel, strides=stride or kernel, pads=pads)
