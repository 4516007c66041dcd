"""A torch image classifier → one ONNX graph for inference, with the factors explicit.

torch.export traces the model with a dynamic batch, torch.onnx translates it (`translation.py` says where it
is told how), and exact passes put the graph in the form that runs fastest without an optimiser:

- every Linear layer, dense or factored, is a Gemm on [B·N, I] with the stored weight of torch: the names and
  shapes of parameters in the file are those of the checkpoint, so a deployed model is updated by name;
- q, k and v are never transposed or copied one by one (`passes/attention.py`);
- nothing that depends on parameters alone is computed at run time, except a product of two of them (folding
  left·right would put the dense matrix back) and the view of a factor as the filters of a 1×1 convolution,
  which copies nothing and lets the factor keep its shape and name.
"""

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import nn

from wasi_export.artifact import InputSpec
from wasi_export.converters.passes.attention import PackedAttentionPass
from wasi_export.converters.passes.finish import FinishPass
from wasi_export.converters.passes.reshape import ReshapePass
from wasi_export.converters.translation import TRANSLATIONS
from wasi_export.errors import ConfigError, UnsupportedModelError

OUTPUT_NAME = "logits"
MIN_OPSET, MAX_OPSET = 18, 25  # torch translates to 18 and higher; onnxruntime 1.24 knows up to 25
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
    exported = _translate(_trace(model.eval(), spec), spec, opset)
    return ir.to_proto(_simplify(exported, name))


def reference_outputs(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns what the graph must reproduce: outputs [B, classes] of the model for images [B, C, H, W]."""
    with torch.inference_mode():
        outputs: NDArray[np.float32] = model.eval()(torch.from_numpy(images)).numpy()
    return outputs


def _trace(model: nn.Module, spec: InputSpec) -> torch.export.ExportedProgram:
    """Returns the traced graph, with a dynamic batch."""
    images = torch.zeros(2, spec.channels, spec.height, spec.width)  # torch.export takes 1 for a constant
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            model(images)  # models that cache a bias table in eval mode do it here, and not while traced
            program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export lets through whatever the model or the tracer raises
        raise UnsupportedModelError(
            f"torch.export cannot take {type(model).__name__} with input {list(images.shape)}: "
            f"{_reason(error)}"
        ) from error
    outputs = program.graph_signature.user_outputs
    shape = getattr(program.graph.output_node().args[0][0], "meta", {}).get("val", torch.empty(0)).shape
    if len(outputs) != 1 or len(shape) != 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {len(outputs)} outputs, the first of shape {list(shape)}: "
            "a classifier gives one, [batch, classes]"
        )
    return program


def _translate(program: torch.export.ExportedProgram, spec: InputSpec, opset: int) -> ir.Model:
    """Returns the ONNX graph as torch writes it, unoptimised."""
    try:
        # Without gradients as in the trace, or attention outputs get other strides and a view of them fails.
        with torch.no_grad():
            exported = torch.onnx.export(
                program,
                opset_version=opset,
                input_names=[spec.name],
                output_names=[OUTPUT_NAME],
                custom_translation_table=dict(TRANSLATIONS),
                external_data=False,
                optimize=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"torch.onnx cannot write the model with opset {opset}: {_reason(error)}"
        ) from error
    assert exported is not None
    return exported.model


def _simplify(model: ir.Model, name: str) -> ir.Model:
    """Returns the same model, rewritten in place by exact passes."""
    common.InlinePass()(model)
    fold_constants(
        model,
        input_size_limit=_FOLD_LIMIT,
        output_size_limit=_FOLD_LIMIT,
        should_fold=lambda node: False if node.op_type in _PRODUCTS or _is_filter_view(node) else None,
    )
    passes = ir.passes.Sequential(
        ReshapePass(),
        common.RemoveUnusedNodesPass(),
        PackedAttentionPass(),
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
    return passes(model).model


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


def _reason(error: BaseException) -> str:
    """Returns the first line of what the error arose from, at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
