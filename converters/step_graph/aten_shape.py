"""Views, slices and indexing of aten in ONNX."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from wasi_export.converters.step_graph.lowering import Lowering, Written, batches, dtype_of, lowers, size_of
from wasi_export.errors import UnsupportedModelError

aten = torch.ops.aten
Size = int | torch.SymInt
_END = 2**62  # what aten writes for "to the end" is larger


@lowers(
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
)
def _same(w: Lowering, node: fx.Node, x: fx.Node, **_: Any) -> ir.Value:
    return w[x]


@lowers(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(w: Lowering, node: fx.Node, x: fx.Node, size: Sequence[Any]) -> ir.Value:
    return w.op("Reshape", w[x], w.shape(size_of(node)))


@lowers(aten.squeeze.dims, aten.squeeze.dim, aten.squeeze.default, aten.unsqueeze.default)
def _squeeze(w: Lowering, node: fx.Node, x: fx.Node, *_: Any) -> ir.Value:
    return w.op("Reshape", w[x], w.shape(size_of(node)))


@lowers(aten.permute.default)
def _permute(w: Lowering, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> ir.Value:
    order = [dim % len(dims) for dim in dims]
    return w[x] if order == sorted(order) else w.op("Transpose", w[x], perm=order)


@lowers(aten.transpose.int)
def _transpose(w: Lowering, node: fx.Node, x: fx.Node, a: int, b: int) -> ir.Value:
    order = list(range(len(size_of(x))))
    order[a], order[b] = order[b], order[a]
    return w.op("Transpose", w[x], perm=order)


@lowers(aten.t.default)
def _t(w: Lowering, node: fx.Node, x: fx.Node) -> ir.Value:
    return w.op("Transpose", w[x], perm=[1, 0])


@lowers(aten.expand.default)
def _expand(w: Lowering, node: fx.Node, x: fx.Node, size: Sequence[Any], **_: Any) -> ir.Value:
    if _equal(size_of(x), size_of(node)):
        return w[x]
    return w.op("Expand", w[x], w.whole_shape(size_of(node)))


@lowers(aten.cat.default)
def _cat(w: Lowering, node: fx.Node, parts: Sequence[fx.Node], dim: int = 0) -> ir.Value:
    return w.op("Concat", *(w[part] for part in parts), axis=dim)


@lowers(aten.stack.default)
def _stack(w: Lowering, node: fx.Node, parts: Sequence[fx.Node], dim: int = 0) -> ir.Value:
    dim %= len(size_of(node))
    return w.op("Concat", *(w.op("Unsqueeze", w[part], w.ints(dim)) for part in parts), axis=dim)


@lowers(aten.slice.Tensor)
def _slice(
    w: Lowering,
    node: fx.Node,
    x: fx.Node,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> ir.Value:
    if _equal(size_of(x), size_of(node)):
        return w[x]
    ends = _END if end is None else min(_known(end), _END)
    return w.op("Slice", w[x], w.ints(_known(start or 0)), w.ints(ends), w.ints(dim), w.ints(step))


@lowers(aten.select.int)
def _select(w: Lowering, node: fx.Node, x: fx.Node, dim: int, index: int) -> ir.Value:
    return w.op("Gather", w[x], w.builder.constant(np.array(_known(index), np.int64)), axis=dim)


@lowers(aten.unbind.int)
def _unbind(w: Lowering, node: fx.Node, x: fx.Node, dim: int = 0) -> Written:
    dim %= len(size_of(x))
    count, part = _known(size_of(x)[dim]), w.shape([n for i, n in enumerate(size_of(x)) if i != dim])
    return [w.op("Reshape", one, part) for one in w.builder.split(w[x], [1] * count, axis=dim)]


@lowers(aten.split_with_sizes.default)
def _split_with_sizes(w: Lowering, node: fx.Node, x: fx.Node, sizes: Sequence[int], dim: int = 0) -> Written:
    return list(w.builder.split(w[x], sizes, axis=dim))


@lowers(aten.split.Tensor)
def _split(w: Lowering, node: fx.Node, x: fx.Node, size: int, dim: int = 0) -> Written:
    whole = _known(size_of(x)[dim])
    return list(w.builder.split(w[x], [min(size, whole - at) for at in range(0, whole, size)], axis=dim))


@lowers(aten.slice_backward.default)
def _slice_backward(
    w: Lowering, node: fx.Node, grad: fx.Node, size: Sequence[Any], dim: int, start: int, end: int, step: int
) -> ir.Value:
    whole = size_of(node)[dim]
    if _equal([whole], [size_of(grad)[dim]]):
        return w[grad]
    if step != 1:
        raise UnsupportedModelError(f"the gradient of a slice in steps of {step} has no form: {node}")
    begin = _known(start) % _known(whole)
    return _padded(w, w[grad], dim, begin, _known(whole) - begin - _known(size_of(grad)[dim]), len(size))


@lowers(aten.select_backward.default)
def _select_backward(
    w: Lowering, node: fx.Node, grad: fx.Node, size: Sequence[Any], dim: int, index: int
) -> ir.Value:
    dim %= len(size)
    whole = _known(size_of(node)[dim])
    index %= whole
    part = w.op("Unsqueeze", w[grad], w.ints(dim))
    return _padded(w, part, dim, index, whole - index - 1, len(size))


@lowers(aten.constant_pad_nd.default)
def _constant_pad_nd(
    w: Lowering, node: fx.Node, x: fx.Node, pad: Sequence[int], value: float = 0
) -> ir.Value:
    rank = len(size_of(x))
    before, after = [0] * rank, [0] * rank
    for place in range(len(pad) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = pad[2 * place], pad[2 * place + 1]
    fill = w.operand(value, dtype_of(node))
    if min(pad) >= 0:
        return w.op("Pad", w[x], w.ints(*before, *after), fill)
    raise UnsupportedModelError(f"a negative padding has no form in a training graph: {node}")


@lowers(aten.flip.default)
def _flip(w: Lowering, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> ir.Value:
    n = len(dims)
    return w.op("Slice", w[x], w.ints(*[-1] * n), w.ints(*[-_END] * n), w.ints(*dims), w.ints(*[-1] * n))


@lowers(aten.roll.default)
def _roll(
    w: Lowering, node: fx.Node, x: fx.Node, shifts: Sequence[int], dims: Sequence[int] = ()
) -> ir.Value:
    value = w[x]
    for shift, dim in zip(shifts, dims, strict=True):
        whole = _known(size_of(x)[dim])
        if shift % whole:
            first, second = w.builder.split(value, [whole - shift % whole, shift % whole], axis=dim)
            value = w.op("Concat", second, first, axis=dim)
    return value


@lowers(aten.gather.default)
def _gather(w: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, **_: Any) -> ir.Value:
    return w.op("GatherElements", w[x], w[index], axis=dim)


@lowers(aten.index_select.default)
def _index_select(w: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> ir.Value:
    return w.op("Gather", w[x], w[index], axis=dim)


@lowers(aten.embedding.default)
def _embedding(w: Lowering, node: fx.Node, weight: fx.Node, index: fx.Node, *_: Any) -> ir.Value:
    return w.op("Gather", w[weight], w[index], axis=0)


@lowers(aten.index.Tensor)
def _index(w: Lowering, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> ir.Value:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise UnsupportedModelError(
            f"indexing by {len(given)} tensors has no form in a training graph: {node}"
        )
    ((axis, index),) = given
    return w.op("Gather", w[x], w[index], axis=axis)


@lowers(aten.index_put.default)
def _index_put(
    w: Lowering,
    node: fx.Node,
    x: fx.Node,
    indices: Sequence[fx.Node | None],
    values: fx.Node,
    accumulate: bool = False,
) -> ir.Value:
    """Writes rows, as the gradient of a table that was looked up is made: rows that come twice are added."""
    if len(indices) != 1 or indices[0] is None:
        raise UnsupportedModelError(
            f"writing at {len(indices)} indices has no form in a training graph: {node}"
        )
    at = w.op("Unsqueeze", w[indices[0]], w.ints(-1))
    return w.op("ScatterND", w[x], at, w[values], reduction="add" if accumulate else "none")


def _padded(w: Lowering, x: ir.Value, dim: int, before: int, after: int, rank: int) -> ir.Value:
    """Returns x with zeros before and after it along an axis."""
    pads = [0] * (2 * rank)
    pads[dim % rank], pads[rank + dim % rank] = before, after
    return w.op("Pad", x, w.ints(*pads))


def _equal(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Returns whether shapes are equal for every batch."""
    return [_key(n) for n in a] == [_key(n) for n in b]


def _key(size: Size) -> tuple[bool, int]:
    times = batches(size)
    return (False, int(size)) if times is None else (True, times)


def _known(size: Any) -> int:
    """Returns a size or an index that does not depend on the batch.

    Raises:
        UnsupportedModelError: it does.
    """
    if batches(size) is not None:
        raise UnsupportedModelError(f"a training graph cannot be cut or indexed along the batch, got {size}")
    return int(size)
