"""The normalisation of the pixels becomes part of the first convolution.

    W ∗ ((x - μ)/σ) + b = (W/σ) ∗ x + (b - Σ W·μ/σ)        per channel of the input

Exact up to the rounding of one product. Needed: the images go into one Conv and nowhere else, without
padding (a border of zeros is one of mean pixels before, and of black ones after), with a weight of its own.
"""

import numpy as np
import onnx_ir as ir

from wasi_export.converters.passes.linears import add_parameter
from wasi_export.converters.passes.values import is_own_parameter
from wasi_export.errors import UnsupportedModelError
from wasi_export.manifest import InputSpec


class NormalizationPass(ir.passes.InPlacePass):
    """Makes a graph take pixels in [0, 1], in place."""

    def __init__(self, spec: InputSpec) -> None:
        """Takes the normalisation from the input's description."""
        super().__init__()
        self.mean, self.std = np.array(spec.mean), np.array(spec.std)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Folds the normalisation.

        Raises:
            UnsupportedModelError: the first operator is not such a convolution.
        """
        conv = _only_conv(model.graph)
        weight, *bias = conv.inputs[1:]
        assert weight is not None
        assert weight.const_value is not None
        filters = weight.const_value.numpy().astype(np.float64) / self.std[:, None, None]
        shift = -np.einsum("ocij,c->o", filters, self.mean)
        if bias and bias[0] is not None:
            assert bias[0].const_value is not None
            bias[0].const_value = ir.tensor(
                (bias[0].const_value.numpy() + shift).astype(np.float32), name=bias[0].name
            )
        else:
            name = f"{str(weight.name).removesuffix('.weight')}.bias"
            conv.resize_inputs(3)
            conv.replace_input_with(2, add_parameter(model.graph, name, shift.astype(np.float32)))
        weight.const_value = ir.tensor(filters.astype(np.float32), name=weight.name)
        return ir.passes.PassResult(model, modified=True)


def _only_conv(graph: ir.Graph) -> ir.Node:
    """Returns the Conv that takes the images."""
    users = [use.node for use in graph.inputs[0].uses()]
    conv = users[0]
    if len(users) == 1 and conv.op_type == "Conv" and conv.attributes.get_int("group", 1) == 1:
        padded = any(conv.attributes.get_ints("pads", [])) or conv.attributes.get_string("auto_pad", "") in (
            "SAME_UPPER",
            "SAME_LOWER",
        )
        if not padded and all(is_own_parameter(value) for value in conv.inputs[1:] if value is not None):
            return conv
    names = ", ".join(sorted({node.op_type for node in users}))
    raise UnsupportedModelError(
        "the normalisation can be folded into a convolution without padding that takes the images alone, "
        f"here they go into {names}{' with padding' if conv.op_type == 'Conv' else ''}: leave out "
        "--fold-normalization"
    )
