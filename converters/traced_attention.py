"""Attention in a traced graph as its translation to ONNX takes it: on four axes, a key for each query head.

Models whose tokens lie in windows or blocks call it with three or five axes: [..., N, d] becomes
[-1, 1, N, d], and its output gets the axes of before. In multi-query and grouped-query attention several
heads share keys and values [B, Hk, M, d]: they are repeated for each, [B, H, M, d].
"""

from typing import Any

import torch

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_EXPAND, _RESHAPE = torch.ops.aten.expand.default, torch.ops.aten.reshape.default
_UNSQUEEZE = torch.ops.aten.unsqueeze.default
_SIZE = torch.ops.aten.sym_size.int


def normalize_attention(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Changes the graph in place, and returns it traced anew where something was changed."""
    graph = program.graph_module.graph
    attentions = [node for node in graph.nodes if node.target is _ATTENTION]
    shared = [node for node in attentions if len(_shape(node)) == 4 and _heads(node, 0) != _heads(node, 1)]
    for node in shared:
        with graph.inserting_before(node):
            query, *pair = node.args[:3]
            pair = [_repeated(graph, part, _heads(node, 0)) for part in pair]
        node.args = (query, *pair, *node.args[3:])
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "enable_gqa"}
    nodes = [node for node in attentions if len(_shape(node)) != 4]
    for node in nodes:
        with graph.inserting_before(node):
            query, key, value, *others = node.args
            named = dict(node.kwargs)
            if others:
                others[0] = _with_mask(graph, others[0], query)
            elif "attn_mask" in named:
                named["attn_mask"] = _with_mask(graph, named["attn_mask"], query)
            flat = (_flattened(graph, part) for part in (query, key, value))
            attended = graph.call_function(_ATTENTION, (*flat, *others), named)
            sizes = [size if isinstance(size, int) else -1 for size in _shape(node)]
            back = graph.call_function(_RESHAPE, (attended, sizes))
        node.replace_all_uses_with(back)
        graph.erase_node(node)
    return program.run_decompositions({}) if nodes or shared else program


def _heads(node: torch.fx.Node, argument: int) -> int:
    """Returns the heads of the queries (0), keys (1) or values (2) of an attention on four axes."""
    part = node.args[argument]
    assert isinstance(part, torch.fx.Node)
    return int(_shape(part)[1])


def _repeated(graph: torch.fx.Graph, node: torch.fx.Node, heads: int) -> torch.fx.Node:
    """Returns keys or values with each head repeated as often as it takes to have so many."""
    own, *rest = _shape(node)[1:]
    apart = graph.call_function(_UNSQUEEZE, (node, 2))
    wide = graph.call_function(_EXPAND, (apart, [-1, -1, heads // own, -1, -1]))
    return graph.call_function(_RESHAPE, (wide, [-1, heads, *rest]))


def _with_mask(graph: torch.fx.Graph, mask: Any, query: torch.fx.Node) -> Any:
    """Returns the mask for flat leading axes; one that has none is the same for all of them."""
    if not isinstance(mask, torch.fx.Node) or len(_shape(mask)) == 2:
        return mask
    *own, rows, columns = _shape(mask)
    leading = _shape(query)[:-2]
    if own == list(leading):
        return _flattened(graph, mask)
    sizes = [
        size if isinstance(size, int) else graph.call_function(_SIZE, (query, axis))
        for axis, size in enumerate(leading)
    ]
    expanded = graph.call_function(_EXPAND, (mask, [*sizes, rows, columns]))
    return graph.call_function(_RESHAPE, (expanded, [-1, 1, rows, columns]))


def _flattened(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    return graph.call_function(_RESHAPE, (node, [-1, 1, *_shape(node)[-2:]]))


def _shape(node: torch.fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape
