"""Exact passes that put a graph in the form that runs fastest without an optimiser. No torch."""

import json
from collections.abc import Mapping

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from wasi_export.converters.passes.attention import PackedAttentionPass
from wasi_export.converters.passes.copies import CopyPass
from wasi_export.converters.passes.explicit_attention import ExplicitAttentionPass
from wasi_export.converters.passes.finish import FinishPass
from wasi_export.converters.passes.layer_scale import LayerScalePass
from wasi_export.converters.passes.mask import MaskPass
from wasi_export.converters.passes.normalization import NormalizationPass
from wasi_export.converters.passes.reshape import ReshapePass
from wasi_export.converters.passes.token_selection import TokenSelectionPass
from wasi_export.converters.passes.value_projection import ValueProjectionPass
from wasi_export.manifest import InputSpec

FOLDED = "folded"
"""Metadata of the file: names of scales that are part of other parameters, {parameter: scale} in JSON."""
IR_VERSION: Mapping[int, int] = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
"""Version of the file format that came with an opset: a runtime that knows the one knows the other."""

_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
_FOLD_LIMIT = 2**22  # elements; a position embedding has up to 10⁶


def simplify(model: ir.Model, name: str) -> onnx.ModelProto:
    """Returns the same model under a name, rewritten in place by exact passes."""
    fold_constants(
        model,
        onnx_shape_inference=True,  # or a Shape of what has a static one is not folded
        input_size_limit=_FOLD_LIMIT,
        output_size_limit=_FOLD_LIMIT,
        should_fold=lambda node: False if node.op_type in _PRODUCTS or _is_filter_view(node) else None,
    )
    scales = LayerScalePass()
    passes = ir.passes.Sequential(
        common.ShapeInferencePass(),
        CopyPass(),
        ReshapePass(),
        common.RemoveUnusedNodesPass(),
        MaskPass(),
        ExplicitAttentionPass(),
        PackedAttentionPass(),
        ReshapePass(),
        common.RemoveUnusedNodesPass(),
        common.ShapeInferencePass(),
        scales,
        TokenSelectionPass(),
        ValueProjectionPass(),
        ReshapePass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
        common.NameFixPass(),
        FinishPass(name=name),
    )
    model = passes(model).model
    if scales.folded:
        model.metadata_props[FOLDED] = json.dumps(scales.folded, sort_keys=True)
    return ir.to_proto(model)


def fold_normalization(model: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """Returns a model that takes pixels in [0, 1] in place of normalised ones.

    Raises:
        UnsupportedModelError: the first operator cannot take the normalisation up.
    """
    graph = ir.from_proto(model)
    NormalizationPass(spec)(graph)
    return ir.to_proto(graph)


def _is_filter_view(node: ir.Node) -> bool:
    """Returns whether a node shows a matrix among the parameters to a Conv as its filters."""
    matrix = node.inputs[0] if node.op_type == "Reshape" else None
    if matrix is None or not matrix.is_initializer() or matrix.shape is None or len(matrix.shape) != 2:
        return False
    return [(use.node.op_type, use.idx) for use in node.outputs[0].uses()] == [("Conv", 1)]
