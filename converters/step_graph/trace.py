"""A function of tensors → its aten operators, for every batch size at once.

Tensors are fake while it is traced: they have a shape and no data. The size of the batch is a symbol, all
others are integers. What the function differentiates is in the trace like everything else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from wasi_export.converters.step_graph.places import module_of_error, noting_places
from wasi_export.converters.step_graph.plain import plain_forms
from wasi_export.converters.step_graph.rules import RULES
from wasi_export.errors import UnsupportedModelError, WasiExportError

aten = torch.ops.aten
TRACED_BATCH = 6  # any number that is no other size of the model; the graph holds for all
# These have a form in ONNX with fewer passes over the data than what they would be taken apart into.
_WHOLE = (
    aten.native_layer_norm_backward, aten.gelu_backward, aten._softmax_backward_data,
    aten._log_softmax_backward_data, aten.silu_backward, aten.sigmoid_backward, aten.tanh_backward,
    aten.slice_backward, aten.select_backward, aten.unbind, aten.split, aten.split_with_sizes,
    aten.silu, aten.threshold_backward, aten.t, aten.transpose, aten.stack, aten.roll, aten.addmm,
    aten.zeros_like, aten.ones_like, aten.avg_pool2d, aten.detach, aten.mean,
)  # fmt: skip


def trace_step(
    function: Callable[..., Sequence[Tensor]],
    batched: Sequence[Tensor],
    others: Sequence[Tensor],
    model: nn.Module,
) -> fx.Graph:
    """Returns the operators of `function(*batched, *others)`, which gives a list of tensors.

    Args:
        function: of tensors; it may use torch.autograd.grad.
        batched: inputs whose first axis is the batch.
        others: inputs of a fixed shape.
        model: whose modules the function runs.

    Raises:
        UnsupportedModelError: it does what cannot be traced, or its result holds for one batch only.
    """
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    inputs = [_fake(mode, tensor, batched=True) for tensor in batched]
    inputs += [_fake(mode, tensor, batched=False) for tensor in others]
    whole = {overload for packet in _WHOLE for overload in _overloads(packet)}
    table = {
        op: rule
        for op, rule in core_aten_decompositions().items()  # type: ignore[no-untyped-call]
        if op not in whole
    }
    table |= RULES

    def is_fixed() -> bool:
        return bool(batched) and not _is_open(inputs[0].shape[0], environment)

    try:
        with (
            mode,
            sdpa_kernel(SDPBackend.MATH),
            plain_forms(model),
            noting_places(model, is_fixed) as places,
        ):
            traced = make_fx(function, decomposition_table=table, tracing_mode="fake")(*inputs)
    except WasiExportError:
        raise
    except Exception as error:  # whatever the model or the tracer raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        module = module_of_error(error, model) or type(model).__name__
        raise UnsupportedModelError(
            f"torch cannot trace a training step, in {module}: {lines[0] if lines else type(error).__name__}"
        ) from error
    if is_fixed():
        where = places[0] if places else "the gradient or the loss"
        raise UnsupportedModelError(f"{where} can be traced for one batch size only: its code asks for it")
    traced.graph.eliminate_dead_code()
    return traced.graph


def _is_open(batch: int | torch.SymInt, environment: ShapeEnv) -> bool:
    """Returns whether the batch may be any number after tracing."""
    if not isinstance(batch, torch.SymInt) or batch.node.expr.is_number:
        return False
    return not any(value.is_number for value in environment.replacements.values())


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]


def _fake(mode: FakeTensorMode, tensor: Tensor, *, batched: bool) -> Tensor:
    if not batched:
        return mode.from_tensor(tensor, static_shapes=True)
    # Duck: images and targets share one symbol, so that no code has to find out that their sizes are equal.
    sizes = [DimDynamic.DUCK, *[DimDynamic.STATIC] * (tensor.ndim - 1)]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
