"""The inference graph as it was written, with what is trained as inputs; and from there to model.onnx.

evaluate.onnx is the graph of `inference.py` before any pass, so each parameter is in it as torch has it: an
input where the training step changes it, else an initializer. Giving the inputs values and doing the passes
again gives a new model.onnx, without torch. With the values of the export it is the same file, to the byte.

A layer whose factors are multiplied out in model.onnx (`--fold`) is dense in it as well; where one of the
factors is trained, its weight is left·right, a product in the graph.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_ir.passes import common

from wasi_export.converters.passes.finish import FinishPass
from wasi_export.converters.passes.linears import add_integers, add_parameter
from wasi_export.converters.passes.values import sizes
from wasi_export.converters.simplify import simplify
from wasi_export.errors import IntegrityError, UnsupportedModelError

Arrays = Mapping[str, NDArray[np.float32]]


def with_inputs(source: ir.Model, trained: Arrays, frozen: Arrays, name: str) -> onnx.ModelProto:
    """Returns a graph with the parameters that are trained as inputs, under their names.

    Args:
        source: as `write_source` gives it.
        trained: values of the parameters that are trained.
        frozen: those of all others.
        name: of the graph.

    Raises:
        UnsupportedModelError: a parameter that is trained has no place of its own in the graph.
    """
    model = source.clone()
    graph = model.graph
    _unfold(graph, trained, frozen)
    if missing := sorted(trained.keys() - graph.initializers.keys()):
        raise UnsupportedModelError(
            f"{', '.join(missing[:3])} would be trained and has no place of its own in the inference graph: "
            "name other parameters as trainable"
        )
    for parameter in trained:
        value = graph.initializers.pop(parameter)
        value.const_value = None
        graph.inputs.append(value)
    common.RemoveUnusedNodesPass()(model)
    FinishPass(name=name)(model)
    return ir.to_proto(model)


def with_values(evaluate: onnx.ModelProto, parameters: Arrays) -> onnx.ModelProto:
    """Returns model.onnx with parameters of these values.

    Args:
        evaluate: as `with_inputs` gives it.
        parameters: a value for each of its inputs but the first.

    Raises:
        IntegrityError: a parameter is missing or of another shape.
    """
    model = ir.from_proto(evaluate)
    graph = model.graph
    for value in list(graph.inputs)[1:]:
        name, shape = str(value.name), value.shape
        array = parameters.get(name)
        if array is None or shape is None or list(array.shape) != list(shape):
            found = "none" if array is None else list(array.shape)
            raise IntegrityError(f"the model needs {name} {shape}, the state has {found}")
        graph.inputs.remove(value)
        value.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
        graph.register_initializer(value)
    _fold(graph)
    return simplify(model, str(graph.name))


def read_evaluate(path: Path) -> onnx.ModelProto:
    """Returns the graph in a file, which the bundle was found to hold."""
    return onnx.load(path)


def frozen_tensors(evaluate: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    """Returns the initializers of a graph by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in evaluate.graph.initializer}


def _unfold(graph: ir.Graph, trained: Arrays, frozen: Arrays) -> None:
    """Makes the dense weights of layers with a factor that is trained products in the graph, in place."""
    layers = {name.rpartition(".")[0] for name in trained if name.endswith((".left", ".right"))}
    for name in sorted(f"{layer}.weight" for layer in layers):
        if (weight := graph.initializers.get(name)) is None:
            continue
        factors = [name.removesuffix("weight") + part for part in ("left", "right")]
        values = [add_parameter(graph, factor, {**frozen, **trained}[factor]) for factor in factors]
        product = ir.node("MatMul", values)
        view = ir.node("Reshape", [product.outputs[0], add_integers(graph, sizes(weight))])
        graph.insert_before(graph[1], [product, view])
        del graph.initializers[name]
        result = view.outputs[0]
        result.name, result.type, result.shape = name, weight.type, weight.shape
        weight.replace_all_uses_with(result)


def _fold(graph: ir.Graph) -> None:
    """Multiplies out what `_unfold` wrote, in place."""
    for view in list(graph):
        product = view.inputs[0].producer() if view.op_type == "Reshape" and view.inputs[0] else None
        if product is None or product.op_type != "MatMul":
            continue
        tensors = [ir.convenience.get_const_tensor(value) for value in product.inputs if value is not None]
        if None in tensors:
            continue
        left, right = (tensor.numpy() for tensor in tensors if tensor is not None)
        result = view.outputs[0]
        weight = add_parameter(graph, str(result.name), (left @ right).reshape(sizes(result)))
        result.name = None
        result.replace_all_uses_with(weight)
        graph.remove([view, product], safe=True)
