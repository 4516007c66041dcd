"""A model → its training step as one plain ONNX graph that the stock runtime runs: no torch on the board.

    images [B, C, H, W], targets, lr, weight_decay, clip_norm, <parameters>, <optimiser state>
        → loss, correct, gradient_norm, <parameters>.next, <optimiser state>.next

Trained parameters are inputs and outputs under their names, and an output may share the buffer of its input;
all others are initializers. The batch is
dynamic. Dropout and stochastic depth are off, and batch norms keep their statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from torch import Tensor, nn

from wasi_export.artifact import InputSpec
from wasi_export.converters.graph_builder import GraphBuilder
from wasi_export.converters.step_graph import aten_math, aten_nn, aten_shape
from wasi_export.converters.step_graph.function import SCALARS, SUMMARY, StepFunction, StepSettings
from wasi_export.converters.step_graph.in_place import check_in_place
from wasi_export.converters.step_graph.losses import example_targets
from wasi_export.converters.step_graph.lowering import DTYPES, Lowering
from wasi_export.converters.step_graph.trace import TRACED_BATCH, trace_step

NEXT = ".next"
"""Of the name of an output that is the new value of an input."""
OPSET, IR_VERSION = 20, 9  # of Gelu; onnxruntime 1.17 knows both
LOWERED_BY = (aten_math, aten_nn, aten_shape)


@dataclass(frozen=True)
class TrainingGraphs:
    """The graphs of a training step, and the state that they begin with."""

    step: onnx.ModelProto
    evaluate: onnx.ModelProto
    """images → outputs, with the trained parameters as inputs."""
    parameters: dict[str, NDArray[np.float32]]
    optimizer: dict[str, NDArray[np.float32]]


def export_training_step(
    model: nn.Module, spec: InputSpec, trainable: Sequence[str], settings: StepSettings
) -> TrainingGraphs:
    """Returns the graphs of a step that trains the named parameters of a model.

    Raises:
        ConfigError: a parameter has no part in the outputs, or there are no blocks to compute again.
        UnsupportedModelError: torch cannot trace the step, or there is no form for an operator of it.
        CheckFailedError: the state of the step cannot be written over.
    """
    function = StepFunction(model.eval(), trainable, settings)
    images = torch.zeros(TRACED_BATCH, spec.channels, spec.height, spec.width)
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    targets = example_targets(settings.loss, TRACED_BATCH, classes)
    scalars = {name: torch.zeros(()) for name in SCALARS}
    changed = {**function.parameters, **function.state}
    step = _write(
        trace_step(
            function.step,
            [images, targets],
            [*scalars.values(), *changed.values(), *function.frozen.values()],
        ),
        {spec.name: images, "targets": targets},
        scalars | changed,
        function.frozen,
        [*SUMMARY, *(f"{name}{NEXT}" for name in changed)],
    )
    check_in_place(step, ((name, f"{name}{NEXT}") for name in changed))
    evaluate = _write(
        trace_step(function.evaluate, [images], [*function.parameters.values(), *function.frozen.values()]),
        {spec.name: images},
        function.parameters,
        function.frozen,
        ["outputs"],
    )
    return TrainingGraphs(step, evaluate, _arrays(function.parameters), _arrays(function.state))


def _write(
    graph: torch.fx.Graph,
    batched: dict[str, Tensor],
    inputs: dict[str, Tensor],
    frozen: dict[str, Tensor],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Returns a traced function as a model; its inputs come in this order."""
    builder = GraphBuilder(nn.Module(), OPSET)
    values = []
    for name, tensor in (batched | inputs).items():
        shape = ir.Shape(["batch", *tensor.shape[1:]] if name in batched else tensor.shape)
        values.append(ir.Value(name=name, shape=shape, type=ir.TensorType(DTYPES[tensor.dtype])))
    builder.graph.inputs.extend(values)
    used = [*values, *(builder.initializer(name, tensor) for name, tensor in frozen.items())]
    results = Lowering(builder, values[0]).run(graph, used)
    traced = next(node for node in graph.nodes if node.op == "output").args[0]
    for name, result, node in zip(outputs, results, traced, strict=True):
        output = _named(builder, result, name)
        sizes = (n if isinstance(n, int) else "batch" for n in node.meta["val"].shape)
        output.shape, output.type = ir.Shape(sizes), ir.TensorType(DTYPES[node.meta["val"].dtype])
        builder.graph.outputs.append(output)
    model = ir.Model(builder.graph, ir_version=IR_VERSION)
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)
    return ir.to_proto(model)


def _named(builder: GraphBuilder, value: ir.Value, name: str) -> ir.Value:
    """Returns the value under a name of its own, also where it is an input or an output already."""
    if value.producer() is None or value.is_graph_output():
        value = builder.op("Identity", value)
    value.name = name
    return value


def _arrays(tensors: dict[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
