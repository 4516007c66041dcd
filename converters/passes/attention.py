"""Attention on packed heads: no transposed copies of q, k, v and the output.

timm computes qkv = x·Wᵀ of shape [B, N, 3·H·D], views it as [B, N, 3, H, D], transposes that to
[3, B, H, N, D] and takes q, k, v from it; the result [B, H, N, D] is transposed back to [B, N, H·D]. The
ONNX operator takes q, k, v as [B, N, H·D] with the number of heads as an attribute, so the whole of it is

    q, k, v = Split(qkv, axis=-1);    y = Attention(q, k, v, q_num_heads=H, kv_num_heads=H)

because 3·H·D is ordered by q/k/v first, then by head. Exact. Needs opset 23.
"""

from typing import NamedTuple

import onnx_ir as ir

from wasi_export.converters.passes.values import integers, only_user, producer

_HEADS_FIRST = (2, 0, 3, 1, 4)  # [B, N, 3, H, D] → [3, B, H, N, D]
_HEADS_BACK = (0, 2, 1, 3)  # [B, H, N, D] → [B, N, H, D]


class PackedAttentionPass(ir.passes.InPlacePass):
    """Gives Attention nodes q, k and v in 3 axes where they are views of one qkv, in place.

    An Attention whose q or k is normalised or rotated after the split is left as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every Attention node that matches."""
        modified = False
        for node in model.graph:
            if node.op_type == "Attention" and node.domain == "":
                modified |= _rewrite(node)
        return ir.passes.PassResult(model, modified)


class _Packed(NamedTuple):
    """The value [..., 3·H·D] that holds q, k and v, and its sizes."""

    value: ir.Value
    tokens: int
    heads: int
    head_dim: int


def _rewrite(attention: ir.Node) -> bool:
    packed = _packed_qkv(attention)
    merge = _merge_of_heads(attention)
    if packed is None or merge is None:
        return False
    width = packed.heads * packed.head_dim
    target = ir.node("Constant", [], {"value": ir.tensor([-1, packed.tokens, 3 * width], ir.DataType.INT64)})
    flat = ir.node("Reshape", [packed.value, target.outputs[0]])
    split = ir.node("Split", flat.outputs, {"axis": -1, "num_outputs": 3}, num_outputs=3)
    new = ir.node(
        "Attention",
        [*split.outputs, *attention.inputs[3:]],
        {**attention.attributes, "q_num_heads": packed.heads, "kv_num_heads": packed.heads},
    )
    new.outputs[0].type = attention.outputs[0].type
    assert attention.graph is not None
    attention.graph.insert_before(attention, (target, flat, split, new))
    # [B, N, H, D] and [B, N, H·D] have their elements in one order, so the Reshape to any target stays.
    merge.replace_input_with(0, new.outputs[0])
    return True


def _packed_qkv(attention: ir.Node) -> _Packed | None:
    """Returns what q, k and v are the slices 0, 1 and 2 of; None for anything else."""
    if len(attention.inputs) > 4:  # past key and value
        return None
    slices = [_leading_slice(value) for value in attention.inputs[:3]]
    sources = {source for source, _ in slices}
    if [index for _, index in slices] != [0, 1, 2] or len(sources) != 1:
        return None
    transpose = producer(sources.pop(), "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != _HEADS_FIRST:
        return None
    view = producer(transpose.inputs[0], "Reshape")
    target = integers(view.inputs[1]) if view is not None else None
    if view is None or target is None or len(target) != 5 or min(target[1:]) < 1 or target[2] != 3:
        return None
    assert view.inputs[0] is not None
    return _Packed(view.inputs[0], tokens=target[1], heads=target[3], head_dim=target[4])


def _leading_slice(value: ir.Value | None) -> tuple[ir.Value | None, int | None]:
    """Returns (x, i) where the value is x[i]: a Gather, or a Squeeze of a Slice of one row."""
    if gather := producer(value, "Gather"):
        index = integers(gather.inputs[1])
        return gather.inputs[0], index[0] if gather.attributes.get_int("axis", 0) == 0 and index else None
    squeeze = producer(value, "Squeeze")
    if squeeze is None or len(squeeze.inputs) < 2 or integers(squeeze.inputs[1]) != [0]:
        return None, None
    rows = producer(squeeze.inputs[0], "Slice")
    if rows is None or len(rows.inputs) < 4:
        return None, None
    start, end, axes = (integers(bound) for bound in rows.inputs[1:4])
    if axes != [0] or not start or not end or end[0] - start[0] != 1:
        return None, None
    return rows.inputs[0], start[0]


def _merge_of_heads(attention: ir.Node) -> ir.Node | None:
    """Returns the only user of the output, a Reshape of it transposed back."""
    transpose = only_user(attention.outputs[0], "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != _HEADS_BACK:
        return None
    merge = only_user(transpose.outputs[0], "Reshape")
    target = integers(merge.inputs[1]) if merge is not None else None
    # A zero in the target copies a size of the input, which would be another input.
    return merge if target and 0 not in target else None
