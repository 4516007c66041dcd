"""A scale of each channel, as LayerScale, becomes part of the Linear before it.

    γ ∘ (x·Wᵀ + b) = x·(diag(γ)·W)ᵀ + γ∘b

Exact up to the rounding of one product. Where the layer is factored, W is `left`. Needed: γ, W and b are
parameters, and nothing else uses W, b or the output of the layer.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from wasi_export.converters.passes.values import integers, is_own_parameter, sizes


class LayerScalePass(ir.passes.InPlacePass):
    """Multiplies weights and biases by the scales that follow them, in place.

    `folded` says afterwards which parameter has which scale in it.
    """

    def __init__(self) -> None:
        """Makes the pass."""
        super().__init__()
        self.folded: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds every scale that follows a Gemm."""
        for node in list(model.graph):
            if node.op_type == "Mul" and node.domain == "":
                first, second = node.inputs
                _ = self._fold(node, first, second) or self._fold(node, second, first)
        return ir.passes.PassResult(model, bool(self.folded))

    def _fold(self, product: ir.Node, output: ir.Value | None, scale: ir.Value | None) -> bool:
        """Makes the scale part of the layer that gives the output; returns whether that can be done."""
        gemm = _layer_before(output)
        if gemm is None or output is None or scale is None or scale.const_value is None:
            return False
        gamma, parameters = scale.const_value.numpy(), gemm.inputs[1:]
        if gamma.shape != tuple(sizes(parameters[0])[:1]) or not all(map(is_own_parameter, parameters)):
            return False
        for parameter in parameters:
            assert parameter is not None
            _multiply(parameter, gamma)
            self.folded[str(parameter.name)] = str(scale.name)
        product.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
        assert product.graph is not None
        product.graph.remove(product, safe=True)
        return True


def _layer_before(value: ir.Value | None) -> ir.Node | None:
    """Returns the Gemm whose output, perhaps as [B, N, O], is used here alone."""
    while value is not None and len(value.uses()) == 1:
        node = value.producer()
        if node is None or node.op_type not in ("Gemm", "Reshape"):
            return None
        if node.op_type == "Gemm":
            return node if node.attributes.get_int("transB", 0) == 1 else None
        source, target = node.inputs[0], integers(node.inputs[1])
        if not target or sizes(source)[-1:] != target[-1:]:
            return None
        value = source
    return None


def _multiply(parameter: ir.Value, gamma: NDArray[np.float32]) -> None:
    """Multiplies the rows of a parameter."""
    assert parameter.const_value is not None
    array = parameter.const_value.numpy()
    parameter.const_value = ir.tensor((array.T * gamma).T, name=parameter.name)
