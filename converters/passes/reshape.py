"""Fewer Reshapes, and none whose target is computed at run time."""

import onnx_ir as ir

from wasi_export.converters.passes.values import integers


class ReshapePass(ir.passes.InPlacePass):
    """Simplifies Reshape nodes, in place.

    1. A target that is computed (from Shape of the input, for the batch) becomes a constant where at most
       one axis of the output is not static; that one is -1.
    2. Reshape(Reshape(x)) becomes the outer one alone.
    3. A Reshape to the sizes that its input has, all but one of them static, is removed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Applies the three rules to every Reshape of the main graph."""
        modified = False
        for node in model.graph:
            if node.op_type != "Reshape" or node.domain != "":
                continue
            modified |= _fix_target(node)
            modified |= _skip_inner(node)
            modified |= _remove_identity(node)
        return ir.passes.PassResult(model, modified)


def _fix_target(node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    if shape is None or integers(node.inputs[1]) is not None:
        return False
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1 or 0 in sizes:
        return False
    constant = ir.node("Constant", [], {"value": ir.tensor(sizes, ir.DataType.INT64)})
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
    return True


def _skip_inner(node: ir.Node) -> bool:
    data = node.inputs[0]
    inner = data.producer() if data is not None else None
    target = integers(node.inputs[1])
    # A zero in the target copies a size of the input, which would be another input.
    if inner is None or inner.op_type != "Reshape" or target is None or 0 in target:
        return False
    node.replace_input_with(0, inner.inputs[0])
    return True


def _remove_identity(node: ir.Node) -> bool:
    data, output, target = node.inputs[0], node.outputs[0], integers(node.inputs[1])
    if data is None or data.shape is None or target is None or output.is_graph_output():
        return False
    # With all but one size alike the last one is alike too, whatever it is.
    sizes = [size if isinstance(size, int) else -1 for size in data.shape]
    if sizes != target or sizes.count(-1) > 1 or 0 in sizes:
        return False
    assert node.graph is not None
    ir.convenience.replace_all_uses_with(output, data)
    node.graph.remove(node, safe=True)
    return True
