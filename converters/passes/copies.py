"""No copies of what stays as it is: a Pad by nothing, a Slice of everything."""

import onnx_ir as ir

from wasi_export.converters.passes.values import integers, sizes


class CopyPass(ir.passes.InPlacePass):
    """Removes Pad and Slice nodes that only copy, in place. Models write them for images of other sizes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Looks at every Pad and Slice."""
        copies = [node for node in model.graph if _only_copies(node)]
        for node in copies:
            source = node.inputs[0]
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, bool(copies))


def _only_copies(node: ir.Node) -> bool:
    if node.domain or node.op_type not in ("Pad", "Slice") or node.outputs[0].is_graph_output():
        return False
    if node.op_type == "Pad":
        pads = integers(node.inputs[1])
        return pads is not None and not any(pads)
    if len(node.inputs) < 4:
        return False
    axes, steps = integers(node.inputs[3]), integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
    if not axes or not steps or not before or not after or any(step != 1 for step in steps):
        return False
    return all(before[axis] == after[axis] != -1 for axis in axes)
