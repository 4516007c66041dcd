"""Products, norms, activations and their gradients in ONNX, in as few passes over the data as there are.

With y = f(x) and dy the gradient of the loss by y:

    LayerNorm    dx = r·(g - mean(g) - x̂·mean(g·x̂)),  g = dy·γ,  x̂ = (x - μ)·r
    Softmax      dx = y·(dy - Σ dy·y)
    GELU         dx = dy·(Φ(x) + x·φ(x)),  Φ, φ: the normal distribution and its density
    SiLU         dx = dy·σ·(1 + x·(1 - σ)),  σ = sigmoid(x)
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
    if beta != 1 or alpha != 1:
        raise UnsupportedModelError(f"it has a form without scales only, got {beta} and {alpha}")
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


@lowers(aten.leaky_relu.default)
def _leaky_relu(w: Lowering, node: fx.Node, x: fx.Node, slope: float = 0.01) -> ir.Value:
    return w.op("LeakyRelu", w[x], alpha=slope)


@lowers(aten.elu.default)
def _elu(
    w: Lowering, node: fx.Node, x: fx.Node, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0
) -> ir.Value:
    if scale != 1 or inner != 1:
        raise UnsupportedModelError(f"it has a form without scales only, got {scale} and {inner}")
    return w.op("Elu", w[x], alpha=float(alpha))


@lowers(aten.threshold_backward.default)
def _threshold_backward(w: Lowering, node: fx.Node, dy: fx.Node, y: fx.Node, threshold: float) -> ir.Value:
    zero = w.operand(0.0, torch.float32)
    return w.op("Where", w.op("Greater", w[y], w.operand(threshold, torch.float32)), w[dy], zero)


@lowers(aten.native_batch_norm.default)
def _batch_norm(
    w: Lowering,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    mean: fx.Node | None,
    variance: fx.Node | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Written:
    if training or mean is None or variance is None:
        raise UnsupportedModelError("a batch norm without statistics of its own has no form: each needs them")
    channels = size_of(x)[1]
    scale, shift = (
        w.op("Expand", w.operand(fill, torch.float32), w.shape([channels])) if given is None else w[given]
        for given, fill in ((weight, 1.0), (bias, 0.0))
    )
    normal = w.op("BatchNormalization", w[x], scale, shift, w[mean], w[variance], epsilon=eps)
    return [normal, w[mean], w[variance]]  # the last two are of a batch in training; nothing reads them


@lowers(aten.native_batch_norm_backward.default)
def _batch_norm_backward(
    w: Lowering,
    node: fx.Node,
    dy: fx.Node,
    x: fx.Node,
    weight: fx.Node | None,
    mean: fx.Node,
    variance: fx.Node,
    save_mean: Any,
    save_rstd: Any,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Written:
    rank = len(size_of(x))
    rows, column = w.ints(0, *range(2, rank)), w.ints(-1, *[1] * (rank - 2))
    variance_eps = w.op("Add", w[variance], w.operand(eps, torch.float32))
    rstd = w.op("Reciprocal", w.op("Sqrt", variance_eps))
    dx = dweight = dbias = None
    if wanted[0]:
        slope = rstd if weight is None else w.op("Mul", rstd, w[weight])
        dx = w.op("Mul", w[dy], w.op("Reshape", slope, column))
    if wanted[1]:
        centred = w.op("Sub", w[x], w.op("Reshape", w[mean], column))
        moment = w.op("ReduceSum", w.op("Mul", w[dy], centred), rows, keepdims=0)
        dweight = w.op("Mul", moment, rstd)
    if wanted[2]:
        dbias = w.op("ReduceSum", w[dy], rows, keepdims=0)
    return [dx, dweight, dbias]
