"""Arithmetic, comparisons and reductions of aten in ONNX."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from wasi_export.converters.step_graph.lowering import Lower, Lowering, Written, dtype_of, lowers, size_of
from wasi_export.errors import UnsupportedModelError

aten = torch.ops.aten
Number = int | float | fx.Node


def _binary(op_type: str) -> Lower:
    def lower(w: Lowering, node: fx.Node, a: Number, b: Number, **_: Any) -> ir.Value:
        tensors = [
            dtype_of(x) for x in (a, b) if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor)
        ]
        common = torch.promote_types(tensors[0], tensors[-1])
        if not common.is_floating_point and dtype_of(node).is_floating_point:
            common = dtype_of(node)
        return w.op(op_type, w.operand(a, common), w.operand(b, common))

    return lower


for _operators, _op_type in (
    ((aten.mul.Tensor, aten.mul.Scalar), "Mul"),
    ((aten.div.Tensor, aten.div.Scalar), "Div"),
    ((aten.eq.Tensor, aten.eq.Scalar), "Equal"),
    ((aten.lt.Tensor, aten.lt.Scalar), "Less"),
    ((aten.le.Tensor, aten.le.Scalar), "LessOrEqual"),
    ((aten.gt.Tensor, aten.gt.Scalar), "Greater"),
    ((aten.ge.Tensor, aten.ge.Scalar), "GreaterOrEqual"),
    ((aten.pow.Tensor_Tensor, aten.pow.Scalar), "Pow"),
    ((aten.maximum.default,), "Max"),
    ((aten.minimum.default,), "Min"),
):
    lowers(*_operators)(_binary(_op_type))


def _scaled(op_type: str) -> Lower:
    plain = _binary(op_type)

    def lower(w: Lowering, node: fx.Node, a: Number, b: Number, alpha: float = 1) -> ir.Value:
        if alpha == 1:
            value = plain(w, node, a, b)
            assert isinstance(value, ir.Value)
            return value
        like = dtype_of(node)
        return w.op(op_type, w.operand(a, like), w.op("Mul", w.operand(b, like), w.operand(alpha, like)))

    return lower


lowers(aten.add.Tensor, aten.add.Scalar)(_scaled("Add"))
lowers(aten.sub.Tensor, aten.sub.Scalar)(_scaled("Sub"))


def _unary(op_type: str) -> Lower:
    def lower(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
        return w.op(op_type, w[x])

    return lower


for _operator, _op_type in (
    (aten.neg.default, "Neg"),
    (aten.exp.default, "Exp"),
    (aten.log.default, "Log"),
    (aten.sqrt.default, "Sqrt"),
    (aten.reciprocal.default, "Reciprocal"),
    (aten.abs.default, "Abs"),
    (aten.erf.default, "Erf"),
    (aten.cos.default, "Cos"),
    (aten.sin.default, "Sin"),
    (aten.sign.default, "Sign"),
    (aten.floor.default, "Floor"),
    (aten.ceil.default, "Ceil"),
    (aten.isnan.default, "IsNaN"),
    (aten.isinf.default, "IsInf"),
):
    lowers(_operator)(_unary(_op_type))


@lowers(operator.truediv)
def _fraction(w: Lowering, node: fx.Node, a: Number, b: Number) -> ir.Value:
    """Of sizes, as a mean over the batch has it."""
    return w.op("Div", w.operand(a, torch.float32), w.operand(b, torch.float32))


@lowers(aten.log1p.default)
def _log1p(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
    return w.op("Log", w.op("Add", w[x], w.operand(1.0, dtype_of(node))))


@lowers(aten.expm1.default)
def _expm1(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
    return w.op("Sub", w.op("Exp", w[x]), w.operand(1.0, dtype_of(node)))


@lowers(aten.rsqrt.default)
def _rsqrt(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
    return w.op("Reciprocal", w.op("Sqrt", w[x]))


@lowers(aten.pow.Tensor_Scalar)
def _pow(w: Lowering, node: fx.Node, x: fx.Node, exponent: float) -> ir.Value:
    if exponent == 2:
        return w.op("Mul", w[x], w[x])
    if exponent == 0.5:
        return w.op("Sqrt", w[x])
    return w.op("Pow", w[x], w.operand(exponent, dtype_of(node)))


@lowers(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(w: Lowering, node: fx.Node, x: fx.Node, low: Any = None, high: Any = None) -> ir.Value:
    if node.target is aten.clamp_max.default:
        low, high = None, low
    value = w[x]
    for op_type, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            value = w.op(op_type, value, w.operand(bound, dtype_of(node)))
    return value


@lowers(aten.hardtanh.default)
def _hardtanh(w: Lowering, node: fx.Node, x: fx.Node, low: float = -1.0, high: float = 1.0) -> Written:
    return _clamp(w, node, x, low, high)


@lowers(aten.where.self)
def _where(w: Lowering, node: fx.Node, condition: fx.Node, a: Number, b: Number) -> ir.Value:
    like = dtype_of(node)
    return w.op("Where", w[condition], w.operand(a, like), w.operand(b, like))


def _logical(op_type: str) -> Lower:
    def lower(w: Lowering, node: fx.Node, a: fx.Node, *b: fx.Node) -> ir.Value:
        if any(dtype_of(x) != torch.bool for x in (a, *b)):
            raise UnsupportedModelError("it has a form for truth values only")
        return w.op(op_type, w[a], *(w[x] for x in b))

    return lower


lowers(aten.bitwise_and.Tensor, aten.logical_and.default)(_logical("And"))
lowers(aten.bitwise_or.Tensor, aten.logical_or.default)(_logical("Or"))
lowers(aten.bitwise_not.default, aten.logical_not.default)(_logical("Not"))


@lowers(aten.ne.Tensor, aten.ne.Scalar)
def _ne(w: Lowering, node: fx.Node, a: fx.Node, b: Number) -> ir.Value:
    equal = _binary("Equal")(w, node, a, b)
    assert isinstance(equal, ir.Value)
    return w.op("Not", equal)


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div(w: Lowering, node: fx.Node, a: fx.Node, b: Number, *, rounding_mode: str | None) -> ir.Value:
    quotient = _binary("Div")(w, node, a, b)
    assert isinstance(quotient, ir.Value)
    if rounding_mode is None:
        return quotient
    if rounding_mode != "floor" or not dtype_of(node).is_floating_point:
        raise UnsupportedModelError(f"it has no form for {dtype_of(node)} rounded by {rounding_mode}")
    return w.op("Floor", quotient)


@lowers(aten.cumsum.default)
def _cumsum(w: Lowering, node: fx.Node, x: fx.Node, dim: int, **_: Any) -> ir.Value:
    value = w[x] if dtype_of(x) == dtype_of(node) else w.cast(w[x], dtype_of(node))
    return w.op("CumSum", value, w.builder.constant(np.array(dim, np.int64)))


@lowers(aten._to_copy.default)
def _to_copy(w: Lowering, node: fx.Node, x: fx.Node, **_: Any) -> ir.Value:
    return w[x] if dtype_of(x) == dtype_of(node) else w.cast(w[x], dtype_of(node))


@lowers(aten.sum.dim_IntList, aten.sum.default)
def _sum(
    w: Lowering, node: fx.Node, x: fx.Node, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> ir.Value:
    value = w[x] if dtype_of(x) == dtype_of(node) else w.cast(w[x], dtype_of(node))
    axes = () if not dim else (w.ints(*dim),)
    return w.op("ReduceSum", value, *axes, keepdims=int(keepdim))


@lowers(aten.mean.dim, aten.mean.default)
def _mean(
    w: Lowering, node: fx.Node, x: fx.Node, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> ir.Value:
    axes = () if not dim else (w.ints(*dim),)
    return w.op("ReduceMean", w[x], *axes, keepdims=int(keepdim))


@lowers(aten.amax.default)
def _amax(w: Lowering, node: fx.Node, x: fx.Node, dim: Sequence[int] = (), keepdim: bool = False) -> ir.Value:
    axes = () if not dim else (w.ints(*dim),)
    return w.op("ReduceMax", w[x], *axes, keepdims=int(keepdim))


@lowers(aten.any.dim, aten.any.dims)
def _any(w: Lowering, node: fx.Node, x: fx.Node, dim: int | Sequence[int], keepdim: bool = False) -> ir.Value:
    axes = w.ints(*([dim] if isinstance(dim, int) else dim))
    counted = w.op("ReduceMax", w.cast(w[x], torch.int32), axes, keepdims=int(keepdim))
    return w.cast(counted, torch.bool)


@lowers(aten.argmax.default)
def _argmax(
    w: Lowering, node: fx.Node, x: fx.Node, dim: int | None = None, keepdim: bool = False
) -> ir.Value:
    if dim is None:
        raise UnsupportedModelError("it has a form along an axis only")
    return w.op("ArgMax", w[x], axis=dim, keepdims=int(keepdim))


@lowers(aten.full.default)
def _full(w: Lowering, node: fx.Node, size: Sequence[Any], value: float, **_: Any) -> ir.Value:
    constant = w.operand(value, dtype_of(node))
    return constant if not size else w.op("Expand", constant, w.whole_shape(size))


@lowers(aten.full_like.default, aten.zeros_like.default, aten.ones_like.default)
def _full_like(w: Lowering, node: fx.Node, x: fx.Node, value: float = 0.0, **_: Any) -> ir.Value:
    filled = 1.0 if node.target is aten.ones_like.default else value
    constant = w.operand(filled, dtype_of(node))
    return constant if not size_of(x) else w.op("Expand", constant, w.whole_shape(size_of(x)))


@lowers(aten.scalar_tensor.default)
def _scalar_tensor(w: Lowering, node: fx.Node, value: float, **_: Any) -> ir.Value:
    return w.operand(value, dtype_of(node))


@lowers(aten.arange.start_step, aten.arange.default)
def _arange(w: Lowering, node: fx.Node, *bounds: int, **_: Any) -> ir.Value:
    return w.builder.constant(np.arange(*bounds).astype(np.int64))


@lowers(operator.getitem)
def _getitem(w: Lowering, node: fx.Node, parts: fx.Node, index: int) -> ir.Value:
    return w.part(parts, index)
