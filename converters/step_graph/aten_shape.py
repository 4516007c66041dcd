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


@lowers(aten.copy.default)
def _copy(w: Lowering, node: fx.Node, x: fx.Node, source: fx.Node, *_: Any) -> ir.Value:
    value = w[source] if dtype_of(source) == dtype_of(node) else w.cast(w[source], dtype_of(node))
    if _equal(size_of(source), size_of(node)):
        return value
    return w.op("Expand", value, w.whole_shape(size_of(node)))


@lowers(aten.repeat.default)
def _repeat(w: Lowering, node: fx.Node, x: fx.Node, repeats: Sequence[Any]) -> ir.Value:
    value, missing = w[x], len(repeats) - len(size_of(x))
    if missing:
        value = w.op("Unsqueeze", value, w.ints(*range(missing)))
    return w.op("Tile", value, w.whole_shape(repeats))


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
    dim %= len(size)
    part, begin, count = w[grad], _known(start), _known(size_of(grad)[dim])
    begin = begin + _known(whole) if begin < 0 else begin
    if step != 1:  # zeros between the rows, and as many after the last
        spread = list(size_of(grad))
        spread[dim] = count = count * step
        between = _padded(w, w.op("Unsqueeze", part, w.ints(dim + 1)), dim + 1, 0, step - 1, len(size) + 1)
        part = w.op("Reshape", between, w.shape(spread))
    return _padded(w, part, dim, begin, _known(whole) - begin - count, len(size))


@lowers(aten.select_backward.default)
def _select_backward(
    w: Lowering, node: fx.Node, grad: fx.Node, size: Sequence[Any], dim: int, index: int
) -> ir.Value:
    dim %= len(size)
    whole = _known(size_of(node)[dim])
    index %= whole
    part = w.op("Unsqueeze", w[grad], w.ints(dim))
    return _padded(w, part, dim, index, whole - index - 1, len(size))


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
    axis, index = _only(indices)
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
    """Writes rows, as the gradient of a table that was looked up is made: rows that come twice are added.

    The axis that is written along is put first, and back after.
    """
    axis, index = _only(indices)
    rank, inner = len(size_of(x)), len(size_of(index))
    first = [axis, *(a for a in range(rank) if a != axis)]
    rows = [*range(axis, axis + inner), *range(axis), *range(axis + inner, rank - 1 + inner)]
    table, given = (w[x], w[values]) if axis == 0 else (
        w.op("Transpose", w[x], perm=first), w.op("Transpose", w[values], perm=rows)
    )  # fmt: skip
    at = w.op("Unsqueeze", w[index], w.ints(-1))
    written = w.op("ScatterND", table, at, given, reduction="add" if accumulate else "none")
    return written if axis == 0 else w.op("Transpose", written, perm=[first.index(a) for a in range(rank)])


def _only(indices: Sequence[fx.Node | None]) -> tuple[int, fx.Node]:
    """Returns the axis and the node of the only index.

    Raises:
        UnsupportedModelError: there are more, or it is a mask.
    """
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or dtype_of(given[0][1]) == torch.bool:
        raise UnsupportedModelError(f"it has a form with one tensor of places, got {len(given)} or a mask")
    return given[0]


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
