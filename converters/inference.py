"""An image classifier → one ONNX graph for inference, with the factors explicit.

A vision transformer of timm is written directly (`vit.py`), any other module is traced (`tracing.py`). Then
exact passes put the graph in the form that runs fastest without an optimiser (`simplify.py`):

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

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from wasi_export.converters.graph_builder import UncoveredModuleError
from wasi_export.converters.simplify import IR_VERSION, simplify
from wasi_export.converters.tracing import MIN_TRACED_OPSET, trace
from wasi_export.converters.vit import write_vit
from wasi_export.errors import ConfigError, UnsupportedModelError
from wasi_export.manifest import InputSpec

OUTPUT_NAME = "logits"
MIN_OPSET, MAX_OPSET = 17, 25  # the first with LayerNormalization; onnxruntime 1.24 knows up to 25
MAX_FILE_BYTES = 2**31 - 1  # of a protobuf message


def export_inference(
    model: nn.Module, spec: InputSpec, *, opset: int, name: str = "model"
) -> onnx.ModelProto:
    """Returns the ONNX model of a classifier: `images` [batch, C, H, W] → `logits` [batch, classes].

    Args:
        model: as for `write_source`.
        spec: name and size of the input.
        opset: version of the ONNX operators.
        name: name of the graph.

    Raises:
        ConfigError: the opset is out of range.
        UnsupportedModelError: torch cannot export the model, or it is too large for one file.
    """
    return simplify(write_source(model, spec, opset=opset), name)


def write_source(model: nn.Module, spec: InputSpec, *, opset: int) -> ir.Model:
    """Returns the graph of a classifier before any pass: each parameter is as torch has it.

    The model is put in eval mode. From opset 23 there are Attention and Gelu operators, from 20 Gelu.

    Args:
        model: any classifier that torch.export takes, in fp32; factored layers are plain F.linear calls.
        spec: name and size of the input.
        opset: version of the ONNX operators.

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
    return graph


def reference_outputs(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns what the graph must reproduce: outputs [B, classes] of the model for images [B, C, H, W]."""
    with torch.inference_mode():
        outputs: NDArray[np.float32] = model.eval()(torch.from_numpy(images)).numpy()
    return outputs


def _require_one_file(model: nn.Module) -> None:
    size_bytes = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    if size_bytes > MAX_FILE_BYTES:
        raise UnsupportedModelError(
            f"the model has {size_bytes / 1e9:.1f} GB of parameters, one ONNX file holds 2.1 GB: "
            "lower the ranks or take a smaller model"
        )
