"""A model → its training step as one plain ONNX graph that the stock runtime runs: no torch on the board.

    images [B, C, H, W], targets, lr, weight_decay, clip_norm, <parameters>, <optimiser state>
        → loss, correct, gradient_norm, <parameters>.next, <optimiser state>.next

or, with `accumulate`, as two: of the first any number of batches can be run before the second.

    images, targets, <parameters>, <bases>, <sums>  → loss, correct, <sums>.next
    lr, weight_decay, clip_norm, <parameters>, <optimiser state>, <sums>
        → gradient_norm, <parameters>.next, <optimiser state>.next

Trained parameters are inputs and outputs under their names, and an output may share the buffer of its input;
all others are initializers. The batch is dynamic. Dropout and stochastic depth are off, and batch norms keep
their statistics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common
from torch import Tensor, nn

from wasi_export.converters.graph_builder import GraphBuilder
from wasi_export.converters.passes.mask import MaskPass
from wasi_export.converters.step_graph import aten_conv, aten_math, aten_nn, aten_pool, aten_shape
from wasi_export.converters.step_graph.function import SCALARS, SUMMARY, StepFunction, StepSettings
from wasi_export.converters.step_graph.in_place import check_in_place
from wasi_export.converters.step_graph.losses import example_targets
from wasi_export.converters.step_graph.lowering import DTYPES, Lowering
from wasi_export.converters.step_graph.trace import TRACED_BATCH, trace_step
from wasi_export.manifest import NEXT, InputSpec

OPSET, IR_VERSION = 20, 9  # of Gelu; onnxruntime 1.17 knows both
LOWERED_BY = (aten_conv, aten_math, aten_nn, aten_pool, aten_shape)


@dataclass(frozen=True)
class ExportedStep:
    """The graph of a training step, and the state that it begins with."""

    step: onnx.ModelProto
    update: onnx.ModelProto | None
    """The second half of the step, where the first ends with sums of gradients."""
    parameters: dict[str, NDArray[np.float32]]
    optimizer: dict[str, NDArray[np.float32]]
    bases: tuple[str, ...] = ()
    """Of `optimizer`, what does not begin as zeros."""
    sums: tuple[str, ...] = ()
    """What the halves have between them; begins as zeros."""


def export_training_step(
    model: nn.Module,
    spec: InputSpec,
    trainable: Sequence[str],
    settings: StepSettings,
    *,
    example: Tensor | None = None,
) -> ExportedStep:
    """Returns the graph of a step that trains the named parameters of a model.

    Args:
        model: with an output [B, C].
        spec: of its input.
        trainable: names of parameters.
        settings: of the step.
        example: one input [1, …] of a model that takes no images, as tokens; its name is that of `spec`.

    Raises:
        ConfigError: a parameter has no part in the outputs, or there are no blocks to compute again.
        UnsupportedModelError: torch cannot trace the step, or there is no form for an operator of it.
        CheckFailedError: the state of the step cannot be written over.
    """
    function = StepFunction(model.eval(), trainable, settings)
    if example is None:
        example = torch.zeros(1, spec.channels, spec.height, spec.width)
    with torch.no_grad():
        classes = model(example).shape[1]
    inputs = torch.cat([example] * TRACED_BATCH)
    batched = {spec.name: inputs, "targets": example_targets(settings.loss, TRACED_BATCH, classes)}
    step, update = (_halves if settings.accumulate else _whole)(function, batched)
    return ExportedStep(
        step,
        update,
        parameters=_arrays(function.parameters),
        optimizer=_arrays(function.state),
        bases=tuple(function.bases),
        sums=tuple(function.sums.initial) if settings.accumulate else (),
    )


def _whole(function: StepFunction, batched: dict[str, Tensor]) -> tuple[onnx.ModelProto, None]:
    """Returns the step in one graph."""
    changed = {**function.parameters, **function.state}
    return _export(
        function.model, function.step, batched, _scalars(), {}, changed, function.frozen, SUMMARY
    ), None


def _halves(function: StepFunction, batched: dict[str, Tensor]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Returns the step in two graphs: up to the sums of the gradients, and from there."""
    read, sums = {**function.parameters, **function.bases}, function.sums.initial
    changed = {**function.parameters, **function.state}
    return (
        _export(function.model, function.gradient, batched, read, {}, sums, function.frozen, SUMMARY[:2]),
        _export(function.model, function.update, {}, _scalars(), sums, changed, {}, SUMMARY[2:]),
    )


def _scalars() -> dict[str, Tensor]:
    return {name: torch.zeros(()) for name in SCALARS}


def _export(
    model: nn.Module,
    function: Callable[..., list[Tensor]],
    batched: dict[str, Tensor],
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    changed: dict[str, Tensor],
    frozen: dict[str, Tensor],
    numbers: Sequence[str],
) -> onnx.ModelProto:
    """Returns numbers and changed' = function(batched, before, changed, after, frozen) as a graph.

    Raises:
        CheckFailedError: what it changes cannot be written over.
    """
    inputs = before | changed | after
    traced = trace_step(function, [*batched.values()], [*inputs.values(), *frozen.values()], model)
    graph = _write(traced, batched, inputs, frozen, [*numbers, *(f"{name}{NEXT}" for name in changed)])
    check_in_place(graph, ((name, f"{name}{NEXT}") for name in changed))
    return graph


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
    MaskPass()(model)
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
