"""An image classifier → one ONNX graph for inference, with the factors explicit.

A vision transformer of timm is written directly (`vit.py`), any other module is traced (`tracing.py`). Then
exact passes put the graph in the form that runs fastest without an optimiser:

- every Linear layer, dense or factored, is a Gemm on [B·N, I] with the stored weight of torch: the names and
  shapes of parameters in the file are those of the checkpoint, so a deployed model is updated by name. Three
  exceptions: what `passes/layer_scale.py` multiplies, what `passes/token_selection.py` cuts in two, and the
  embeddings that `vit.py` adds up;
- q, k and v are never transposed or copied one by one (`passes/attention.py`);
- the last block is computed for the tokens that the head reads (`passes/token_selection.py`);
- nothing that depends on parameters alone is computed at run time, except a product of two of them (folding
  left·right would put the dense matrix back) and the view of a factor as the filters of a 1×1 convolution,
  which copies nothing and lets the factor keep its shape and name.
"""

import json

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import nn

from wasi_export.artifact import InputSpec
from wasi_export.converters.graph_builder import UncoveredModuleError
from wasi_export.converters.passes.attention import PackedAttentionPass
from wasi_export.converters.passes.finish import FinishPass
from wasi_export.converters.passes.layer_scale import LayerScalePass
from wasi_export.converters.passes.reshape import ReshapePass
from wasi_export.converters.passes.token_selection import TokenSelectionPass
from wasi_export.converters.passes.value_projection import ValueProjectionPass
from wasi_export.converters.tracing import MIN_TRACED_OPSET, trace
from wasi_export.converters.vit import write_vit
from wasi_export.errors import ConfigError, UnsupportedModelError

OUTPUT_NAME = "logits"
FOLDED = "folded"
"""Metadata of the file: names of scales that are part of other parameters, {parameter: scale} in JSON."""
MIN_OPSET, MAX_OPSET = 17, 25  # the first with LayerNormalization; onnxruntime 1.24 knows up to 25
IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
"""Version of the file format that came with an opset: a runtime that knows the one knows the other."""
MAX_FILE_BYTES = 2**31 - 1  # of a protobuf message

_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
_FOLD_LIMIT = 2**22  # elements; a position embedding has up to 10⁶


def export_inference(
    model: nn.Module, spec: InputSpec, *, opset: int, name: str = "model"
) -> onnx.ModelProto:
    """Returns the ONNX model of a classifier: `images` [batch, C, H, W] → `logits` [batch, classes].

    The model is put in eval mode. From opset 23 there are Attention and Gelu operators, from 20 Gelu.

    Args:
        model: any classifier that torch.export takes, in fp32; factored layers are plain F.linear calls.
        spec: name and size of the input.
        opset: version of the ONNX operators.
        name: name of the graph.

    Raises:
        ConfigError: the opset is out of range.
        UnsupportedModelError: torch cannot export the model, or it is too large for one file.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ConfigError(f"opset must be {MIN_OPSET} to {MAX_OPSET}, got {opset}: 23 is the fastest graph")
    _require_one_file(model)
    try:
        graph = write_vit(model.eval(), spec, opset=opset, output=OUTPUT_NAME)
    except UncoveredModuleError as error:
        if opset < MIN_TRACED_OPSET:
            raise ConfigError(
                f"{error}: opset {opset} is too low for torch, give {MIN_TRACED_OPSET}"
            ) from error
        graph = trace(model, spec, opset=opset, output=OUTPUT_NAME)
    rank = len(graph.graph.outputs[0].shape or ())
    if rank != 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives an output of {rank} axes; a classifier gives [batch, classes]"
        )
    graph.ir_version = IR_VERSION[opset]
    return ir.to_proto(_simplify(graph, name))


def reference_outputs(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns what the graph must reproduce: outputs [B, classes] of the model for images [B, C, H, W]."""
    with torch.inference_mode():
        outputs: NDArray[np.float32] = model.eval()(torch.from_numpy(images)).numpy()
    return outputs


def _simplify(model: ir.Model, name: str) -> ir.Model:
    """Returns the same model, rewritten in place by exact passes."""
    fold_constants(
        model,
        input_size_limit=_FOLD_LIMIT,
        output_size_limit=_FOLD_LIMIT,
        should_fold=lambda node: False if node.op_type in _PRODUCTS or _is_filter_view(node) else None,
    )
    scales = LayerScalePass()
    passes = ir.passes.Sequential(
        common.ShapeInferencePass(),
        ReshapePass(),
        common.RemoveUnusedNodesPass(),
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
    return model


def _is_filter_view(node: ir.Node) -> bool:
    """Returns whether a node shows a matrix among the parameters to a Conv as its filters."""
    matrix = node.inputs[0] if node.op_type == "Reshape" else None
    if matrix is None or not matrix.is_initializer() or matrix.shape is None or len(matrix.shape) != 2:
        return False
    return [(use.node.op_type, use.idx) for use in node.outputs[0].uses()] == [("Conv", 1)]


def _require_one_file(model: nn.Module) -> None:
    size_bytes = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    if size_bytes > MAX_FILE_BYTES:
        raise UnsupportedModelError(
            f"the model has {size_bytes / 1e9:.1f} GB of parameters, one ONNX file holds 2.1 GB: "
            "lower the ranks or take a smaller model"
        )
