"""Where ranks are small, the values of attention stay in the rank of the projection.

With V = z·Lᵀ (L the rows of `qkv.left` for v, z [N, R]) and the projection's first factor P = `proj.right`
(K×H·D), both products of a head h act on numbers that nothing else uses:

    Σ_h A_h·V_h·P_hᵀ = Σ_h A_h·z·M_hᵀ        M_h = P_h·L_h   (K×R)

so each head mixes K numbers of a token in place of D, and their sum is what the projection's second factor
takes. A bias of v goes along, as the rows of A_h sum to one; A_h keeps its scale, cap and causality. In
multiply-adds of an image with Q queries:

    N·R·H·D + Q·N·H·D + Q·H·D·K   →   N·R·H·K + Q·N·H·K

Done only where that is less and K is at most `RANK_LIMIT`: at K = 72 a ViT-S gained nothing. Exact up to the
rounding of one product. The new parameter is named after what it is the product of.
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from wasi_export.converters.passes.linears import SplitLinear, add_integers, add_parameter
from wasi_export.converters.passes.values import is_own_parameter, only_user, sizes

RANK_LIMIT = 48
PRODUCT = " @ "
"""Between the names of two parameters: their product, head by head."""


class ValueProjectionPass(ir.passes.InPlacePass):
    """Makes the values and the first factor of the projection one product, in place. Needs opset 23."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every attention that gains."""
        found = [_find(node) for node in model.graph if node.op_type == "Attention"]
        for match in found:
            if match is not None:
                _rewrite(match)
        return ir.passes.PassResult(model, any(found))


class _Match(NamedTuple):
    """An attention [B, Q, H·D] and what is around it."""

    attention: ir.Node
    values: SplitLinear
    """Its last output is v [B, N, H·D]."""
    projection: ir.Node
    """The Gemm with P, on rows [B·Q, H·D]."""
    heads: int


def _find(attention: ir.Node) -> _Match | None:
    """Returns an attention of which v and the projection can meet, and should."""
    v = attention.inputs[2]
    split = v.producer() if v is not None else None
    rows = only_user(attention.outputs[0], "Reshape")
    projection = only_user(rows.outputs[0], "Gemm") if rows is not None else None
    if len(attention.inputs) != 3 or split is None or split.op_type != "Split" or projection is None:
        return None
    values = SplitLinear.before(split)
    if values is None or v is not split.outputs[-1] or len(v.uses()) != 1:
        return None
    first_factor = len(projection.inputs) == 2 and is_own_parameter(projection.inputs[1])
    heads = attention.attributes.get_int("kv_num_heads", 0)
    if not first_factor or heads != attention.attributes.get_int("q_num_heads", -1):
        return None
    (K, width), R = sizes(projection.inputs[1]), sizes(values.parameters[0])[1]
    of_v, of_q = sizes(v), sizes(attention.inputs[0])
    if K > RANK_LIMIT or len(of_v) != 3 or len(of_q) != 3 or -1 in of_v[1:] + of_q[1:] or of_v[2] != width:
        return None
    N, Q = of_v[1], of_q[1]
    before = N * R * width + Q * N * width + Q * width * K
    after = N * R * heads * K + Q * N * heads * K
    return _Match(attention, values, projection, heads) if after < before else None


def _rewrite(match: _Match) -> None:
    attention, values, projection, heads = match
    graph = attention.graph
    assert graph is not None
    P = projection.inputs[1]
    assert P is not None
    assert P.const_value is not None
    K, N = sizes(P)[0], sizes(attention.inputs[2])[1]
    by_head = P.const_value.numpy().reshape(K, heads, -1)
    z, tokens = values.gemm.inputs[0], [-1, N, heads * K]
    parameters = [
        add_parameter(graph, f"{P.name}{PRODUCT}{name}", _product(by_head, rows))
        for name, rows in values.take(len(values.split.outputs) - 1)
    ]
    gemm = ir.node("Gemm", [z, *parameters], {"transB": 1})
    view = ir.node("Reshape", [gemm.outputs[0], add_integers(graph, tokens)])
    # Written out, as values of another width than the queries leave runtimes a choice of the default.
    scale = attention.attributes.get_float("scale", (sizes(attention.inputs[0])[2] / heads) ** -0.5)
    new = ir.node(
        "Attention",
        [*attention.inputs[:2], view.outputs[0]],
        {**attention.attributes, "q_num_heads": heads, "kv_num_heads": heads, "scale": scale},
    )
    apart = ir.node("Reshape", [new.outputs[0], add_integers(graph, [-1, heads, K])])
    total = ir.node("ReduceSum", [apart.outputs[0], add_integers(graph, [1])], {"keepdims": 0})
    graph.insert_before(projection, (gemm, view, new, apart, total))
    total.outputs[0].type, total.outputs[0].shape = projection.outputs[0].type, projection.outputs[0].shape
    projection.outputs[0].replace_all_uses_with(total.outputs[0])


def _product(by_head: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns P_h·L_h of all heads as rows [H·K, R], or P_h·b_h as [H·K]."""
    heads, width = by_head.shape[1:]
    parts = rows.reshape(heads, width, *rows.shape[1:]).astype(np.float64)
    products = [by_head[:, head] @ parts[head] for head in range(heads)]
    return np.concatenate(products).astype(np.float32)
