"""Which part of a model a step's time goes to, told from what torch.profiler recorded.

A range is put around every module of a known kind, and around every phase of the step. Then an operator

    in the forward pass    counts for the innermost range it runs in: the matrix product of a factored layer
                           for `factored linear`, the softmax between two of them for `attention`
    in the backward pass   counts for the range of the forward operator it is the gradient of, which has the
                           same sequence number; the operators that run before one that makes a graph node
                           show its number too, so the last to start is the one
    without a range        counts for `other`

with the time that is its own, not that of the operators it calls. Code that is no module can be a part as
well: `torch.profiler.record_function("wasi.NAME")` around it is a range.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # documented, but not in __all__
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from wasi_export.subspace.linear import SubspaceLinear

PART = "wasi."
PHASE = "phase."
_NODE = "autograd::engine::evaluate_function"
_BACKWARD_SCOPE = 1  # at::RecordScope::BACKWARD_FUNCTION

KINDS: Mapping[str, tuple[str, ...]] = {
    "norm": ("norm", "norm1d", "norm2d", "normact2d"),
    "attention": ("attention", "attn", "attention2d"),
    "mlp": ("mlp", "swiglu"),
}
"""Ends of class names, in small letters, by the kind they tell."""

PartTimes = dict[str, dict[str, float]]
"""Time by phase and, in it, by part; in any unit."""


def kind_of(module: nn.Module) -> str | None:
    """Returns what a module counts for; None: for the module around it."""
    if isinstance(module, SubspaceLinear):
        return "factored linear"
    if isinstance(module, nn.Linear):
        return "dense linear"
    if isinstance(module, nn.Conv2d):
        return "convolution"
    name = type(module).__name__.lower()
    return next((kind for kind, ends in KINDS.items() if name.endswith(ends)), None)


@contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """Puts a range around every forward pass of a module of a known kind, as long as the context lasts."""
    open_ranges: list[record_function] = []

    def enter(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            opened = record_function(PART + kind)
            opened.__enter__()  # type: ignore[no-untyped-call]
            open_ranges.append(opened)

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = []
    for module in model.modules():
        if (kind := kind_of(module)) is not None:
            hooks += [module.register_forward_pre_hook(enter(kind)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def part_times(events: Iterable[FunctionEvent], *, on_device: bool = False) -> PartTimes:
    """Returns the events' own time in µs by phase and part: the processor's, or that of device kernels."""
    # A kernel is an event of the device and of the operator that started it; it is counted for the operator.
    on_host = (event for event in events if event.device_type == DeviceType.CPU)
    events = sorted(on_host, key=lambda event: event.time_range.start)
    phases = [event for event in events if event.name.startswith(PHASE)]
    forward: dict[tuple[int | None, int], FunctionEvent] = {}
    for event in events:
        if event.sequence_nr >= 0 and event.scope != _BACKWARD_SCOPE and not event.name.startswith(_NODE):
            forward[event.thread, event.sequence_nr] = event
    times: PartTimes = defaultdict(lambda: defaultdict(float))
    for event in events:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        phase = _phase_of(event, phases) if own else None
        if phase is not None:
            times[phase][_part_of(event, forward)] += own
    return times


def _phase_of(event: FunctionEvent, phases: list[FunctionEvent]) -> str | None:
    """Returns the phase during which an event started; on a GPU autograd has a thread of its own."""
    start = event.time_range.start
    for phase in phases:
        if phase.time_range.start <= start <= phase.time_range.end:
            return phase.name.removeprefix(PHASE)
    return None


def _part_of(event: FunctionEvent, forward: Mapping[tuple[int | None, int], FunctionEvent]) -> str:
    """Returns the part of the innermost range around an event, or around the one it is the gradient of."""
    current: FunctionEvent | None = event
    while current is not None:
        if current.name.startswith(PART):
            return current.name.removeprefix(PART)
        if current.name.startswith(_NODE):
            current = forward.get((current.fwd_thread, current.sequence_nr))
        else:
            current = current.cpu_parent
    return "other"
