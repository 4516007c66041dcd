"""Smaller numbers for a graph that is finished: int8 products, or weights stored in half.

int8: weights S8 with a scale for each output, activations U8 with a scale that each run takes from its own
numbers (onnxruntime's dynamic quantisation). What else there is was slower: docs/inference.md.

fp16 storage: weights as half, and a Cast that the runtime folds when it loads the model. Half the file, the
same speed, an error of 2⁻¹¹ for each weight.
"""

import logging
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxruntime.quantization import QuantType, quantize_dynamic

from wasi_export.config import Int8Factors
from wasi_export.converters.passes.balance import BalancePass
from wasi_export.converters.passes.linears import add_parameter
from wasi_export.errors import UnsupportedModelError

HALF_ELEMENTS = 256
"""Parameters below this stay as they are: nothing is gained."""
LARGEST_HALF = float(np.finfo(np.float16).max)


def quantizable_weights(model: onnx.ModelProto) -> tuple[str, ...]:
    """Returns the names of the weights of the products that can be int8, in the order of the graph."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return tuple(
        node.input[1] for node in model.graph.node if node.op_type == "Gemm" and node.input[1] in initializers
    )


def other_factors(model: onnx.ModelProto, factor: Int8Factors) -> tuple[str, ...]:
    """Returns the names of the weights that stay fp32 where only the `left` or only the `right` are int8."""
    other = {"both": None, "left": "right", "right": "left"}[factor]
    names = quantizable_weights(model)
    return tuple(name for name in names if other and name.split("[")[0].endswith(f".{other}"))


def to_int8(model: onnx.ModelProto, *, kept: Collection[str] = ()) -> onnx.ModelProto:
    """Returns the graph with int8 products.

    Args:
        model: as `export_inference` gives it, in fp32.
        kept: weights whose products stay fp32.
    """
    balanced = ir.from_proto(model)
    ir.passes.Sequential(common.ShapeInferencePass(), BalancePass())(balanced)
    proto = ir.to_proto(balanced)
    # The library writes a Gemm as MatMul and Add first, and names them so.
    excluded = [f"{node.name}_MatMul" for node in proto.graph.node if set(node.input[1:2]) & set(kept)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it advises a pre-processing that is done already
        try:
            quantize_dynamic(
                proto,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                extra_options={"MatMulConstBOnly": True},
            )
        finally:
            root.setLevel(level)
        return onnx.load(path)


def to_fp16_storage(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the graph with its larger parameters stored in half, cast back where they are used.

    Raises:
        UnsupportedModelError: a parameter is too large for a half.
    """
    graph_model = ir.from_proto(model)
    graph = graph_model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < HALF_ELEMENTS:
            continue
        array = tensor.numpy()
        if np.abs(array).max() > LARGEST_HALF:
            raise UnsupportedModelError(
                f"{value.name} has numbers above {LARGEST_HALF:.0f}, the largest half"
            )
        half = array.astype(np.float16)
        name = str(value.name)
        del graph.initializers[name]
        stored = add_parameter(graph, name, half)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
        graph.insert_before(graph[0], cast)
        cast.outputs[0].name = f"{name}:fp32"
        value.replace_all_uses_with(cast.outputs[0])
    return ir.to_proto(graph_model)
