"""One Linear layer as an ONNX model, in the form the exporter gives it: what the planner measures.

    dense     rows [T, I] → Gemm(weight [O, I], bias) → [T, O]
    pair      rows [T, I] → Gemm(right [K, I]) → Gemm(left [O, K], bias) → [T, O]

Values are random: the time of a product does not depend on them.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from wasi_export.cost import LinearForm

OPSET, IR_VERSION = 18, 10  # Gemm is the same from opset 13 on


def linear_graph(form: LinearForm) -> bytes:
    """Returns the model of a layer for one image: `rows` [tokens, I] → `out` [tokens, O]."""
    O, I, K = form.out_features, form.in_features, form.rank
    shapes = {"weight": (O, I)} if K is None else {"right": (K, I), "left": (O, K)}
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tensors["bias"] = np.zeros(O, np.float32)
    if K is None:
        nodes = [helper.make_node("Gemm", ["rows", "weight", "bias"], ["out"], transB=1)]
    else:
        nodes = [
            helper.make_node("Gemm", ["rows", "right"], ["code"], transB=1),
            helper.make_node("Gemm", ["code", "left", "bias"], ["out"], transB=1),
        ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, [form.tokens, I])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [form.tokens, O])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION).SerializeToString()
    return model
