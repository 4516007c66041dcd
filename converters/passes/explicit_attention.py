"""Attention that a model writes out becomes one operator.

    softmax(s·q·kᵀ + b)·v    is    Attention(q, k, v, b, scale=s)

with q [B, H, N, D], k [B, H, M, D], v [B, H, M, E]. b is whatever is added to the scores; a scale [H, 1, 1],
one for each head, goes to q. Windows that are shifted (Swin) view the scores as [B/W, W, H, N, M] and add a
mask [1, W, 1, N, M] there: it is added to the bias [1, H, N, M] instead, which does not depend on the images,
and the sum is repeated for each image. Exact up to the order of additions and products. Needs opset 23.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx_ir as ir

from wasi_export.converters.passes.linears import add_integers
from wasi_export.converters.passes.values import only_user, producer, sizes

_SWAPPED = [0, 1, 3, 2]


class ExplicitAttentionPass(ir.passes.InPlacePass):
    """Puts Attention nodes where there are a product, a softmax and a product, in place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every Softmax that matches."""
        if (model.opset_imports.get("") or 0) < 23:
            return ir.passes.PassResult(model, False)
        found = [_find(node, model.graph) for node in model.graph if node.op_type == "Softmax"]
        for match in found:
            if match is not None:
                _rewrite(match, model.graph)
        return ir.passes.PassResult(model, any(found))


class _Match(NamedTuple):
    """The parts of an attention, and the node that gives its output."""

    query: ir.Value
    key: ir.Value
    """[B, H, D, M], as the product takes it."""
    value: ir.Value
    scale: float
    head_scale: ir.Value | None
    bias: ir.Value | None
    mask: ir.Value | None
    last: ir.Node


def _find(softmax: ir.Node, graph: ir.Graph) -> _Match | None:
    """Returns the attention that a softmax is part of; None where it is none, or one of another form."""
    last = only_user(softmax.outputs[0], "MatMul")
    if last is None or last.inputs[0] is not softmax.outputs[0]:
        return None
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    mask, scores = _take_mask(softmax.inputs[0], graph)
    bias, scores = _take_bias(scores)
    scale, head_scale, scores = _take_scale(scores)
    first = _own_producer(scores, "MatMul")
    if first is None:
        return None
    query, key, value = first.inputs[0], first.inputs[1], last.inputs[1]
    of_query, of_heads, before = _take_scale(query)
    if of_heads is None:
        scale, query = scale * of_query, before
    if query is None or key is None or value is None or not _same_batch_and_heads(query, key, value):
        return None
    scores_sizes = [sizes(query)[1], sizes(query)[2], sizes(key)[3]]
    if -1 in scores_sizes or scale <= 0 or not _can_add(bias, mask, scores_sizes):
        return None
    return _Match(query, key, value, scale, head_scale, bias, mask, last)


def _can_add(bias: ir.Value | None, mask: ir.Value | None, scores: list[int]) -> bool:
    """Returns whether a bias and a mask can be added to scores [B, H, N, M] of the sizes [H, N, M]."""
    if mask is not None:
        return sizes(mask)[2:] == [1, *scores[1:]] and sizes(bias) == [1, *scores]
    return bias is None or sizes(bias) in (scores[1:], scores, [1, *scores], [1, 1, *scores[1:]])


def _same_batch_and_heads(*values: ir.Value) -> bool:
    """Returns whether all have four axes, the first two alike; a product would repeat one that has less."""
    shapes = [value.shape for value in values]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return False
    leading = {(str(shape[0]), str(shape[1])) for shape in shapes if shape is not None}
    return len(leading) == 1 and "None" not in leading.pop()


def _take_mask(scores: ir.Value | None, graph: ir.Graph) -> tuple[ir.Value | None, ir.Value | None]:
    """Returns the mask of windows that is added to scores, and the scores without it."""
    merge = _own_producer(scores, "Reshape")
    add = _own_producer(merge.inputs[0], "Add") if merge is not None else None
    apart = _own_producer(add.inputs[0], "Reshape") if add is not None else None
    if add is None or apart is None or len(sizes(add.inputs[0])) != 5 or len(sizes(apart.inputs[0])) != 4:
        return None, scores
    mask, shape, images = add.inputs[1], apart.outputs[0].shape, graph.inputs[0].shape
    if mask is None or ir.convenience.get_const_tensor(mask) is None or len(sizes(mask)) != 5:
        return None, scores
    if shape is None or images is None or shape[0] != images[0] or shape[1] != sizes(mask)[1]:
        return None, scores
    return mask, apart.inputs[0]


def _take_bias(scores: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Returns what is added to scores, and the scores without it."""
    add = _own_producer(scores, "Add")
    return (None, scores) if add is None else (add.inputs[1], add.inputs[0])


def _take_scale(value: ir.Value | None) -> tuple[float, ir.Value | None, ir.Value | None]:
    """Returns what a value is multiplied by, as a number or for each head, and the value before that."""
    node = _own_producer(value, "Mul")
    factor = node.inputs[1] if node is not None else None
    tensor = ir.convenience.get_const_tensor(factor) if factor is not None else None
    if node is None or factor is None or tensor is None:
        return 1.0, None, value
    if tensor.size == 1:
        return float(tensor.numpy().item()), None, node.inputs[0]
    if sizes(factor)[-3:] == [sizes(value)[1], 1, 1] and tensor.size == sizes(value)[1]:
        return 1.0, factor, node.inputs[0]
    return 1.0, None, value


def _rewrite(match: _Match, graph: ir.Graph) -> None:
    """Puts the operator in place of the last product."""

    def add(op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or None)
        graph.insert_before(match.last, node)
        return node.outputs[0]

    query, key = match.query, match.key
    if match.head_scale is not None:
        query = add("Mul", [query, match.head_scale])
    inputs = [query, _transposed(key, add), match.value]
    if match.bias is not None and match.mask is None:
        inputs.append(match.bias)
    elif match.bias is not None and match.mask is not None:
        each = sizes(match.bias)[1:]
        total = add("Add", [add("Reshape", [match.bias, add_integers(graph, [1, 1, *each])]), match.mask])
        images = add("Shape", [graph.inputs[0]], start=0, end=1)
        target = add("Concat", [images, add_integers(graph, [sizes(match.mask)[1], *each])], axis=0)
        inputs.append(add("Reshape", [add("Expand", [total, target]), add_integers(graph, [-1, *each])]))
    output = add("Attention", inputs, scale=match.scale)
    old = match.last.outputs[0]
    output.type, output.shape = old.type, old.shape
    old.replace_all_uses_with(output)


def _transposed(key: ir.Value, add: Callable[..., ir.Value]) -> ir.Value:
    """Returns keys [B, H, M, D]."""
    node, source, order = producer(key, "Transpose"), key, [0, 1, 2, 3]
    if node is not None and node.inputs[0] is not None:
        source, order = node.inputs[0], list(node.attributes.get_ints("perm", (3, 2, 1, 0)))
    order = [order[axis] for axis in _SWAPPED]
    return source if order == [0, 1, 2, 3] else add("Transpose", [source], perm=order)


def _own_producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Returns the node that gives a value, if it is of this kind and the value is used once."""
    return producer(value, op_type) if value is not None and len(value.uses()) == 1 else None
