"""Any torch module → the ONNX graph that torch writes: torch.export traces it, torch.onnx translates it.

`translation.py` says where torch.onnx is told how; `passes/` make the graph fast.
"""

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import nn

from wasi_export.converters.traced_attention import normalize_attention
from wasi_export.converters.translation import TRANSLATIONS
from wasi_export.errors import UnsupportedModelError
from wasi_export.manifest import InputSpec

MIN_TRACED_OPSET = 18  # torch translates to no lower one


def trace(model: nn.Module, spec: InputSpec, *, opset: int, output: str) -> ir.Model:
    """Returns the graph of a module of one output, with a dynamic batch and without functions.

    Args:
        model: in eval mode, in fp32.
        spec: name and size of the input.
        opset: version of the ONNX operators, 18 or higher.
        output: name of the output.

    Raises:
        UnsupportedModelError: torch cannot trace or translate the model.
    """
    graph = _translate(_trace(model, spec), spec, opset, output)
    common.InlinePass()(graph)
    return graph


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
    if len(outputs) != 1:
        raise UnsupportedModelError(f"{type(model).__name__} gives {len(outputs)} outputs, expected one")
    return normalize_attention(program)


def _translate(program: torch.export.ExportedProgram, spec: InputSpec, opset: int, output: str) -> ir.Model:
    """Returns the ONNX graph as torch writes it, unoptimised."""
    try:
        # Without gradients as in the trace, or attention outputs get other strides and a view of them fails.
        with torch.no_grad():
            exported = torch.onnx.export(
                program,
                opset_version=opset,
                input_names=[spec.name],
                output_names=[output],
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


def _reason(error: BaseException) -> str:
    """Returns the first line of what the error arose from, at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
