"""Attention in a traced graph with four axes, which is what its translation to ONNX takes.

Models whose tokens lie in windows or blocks call it with three or five axes: [..., N, d] becomes
[-1, 1, N, d], and its output gets the axes of before.
"""

from typing import Any

import torch

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_EXPAND, _RESHAPE = torch.ops.aten.expand.default, torch.ops.aten.reshape.default
_SIZE = torch.ops.aten.sym_size.int


def give_four_axes(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Changes the graph in place, and returns it traced anew where something was changed."""
    graph = program.graph_module.graph
    nodes = [node for node in graph.nodes if node.target is _ATTENTION and len(_shape(node)) != 4]
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
    return program.run_decompositions({}) if nodes else program


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
