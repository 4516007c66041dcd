"""Where the time of a training step goes: by phase with timers, inside the phases with torch's profiler.

    phases      data │ forward │ backward │ clipping │ update, wall and processor time of every step but the
                first ones, with no profiler running; `other` is what a step does between them
    parts       some steps run under torch.profiler, whose operators `profile_parts` assigns to kinds of
                modules. The profiler slows small operators down, so a part is given as its share of the
                phase times the mean of the phase. What factored layers do once in some steps, moves of bases
                and gauge, is in those steps as often as in all, and in a mean, not in a median.

Evaluation and checkpoints are not measured. Nothing that is computed changes. Where several processes train,
it is the main one that is measured.
"""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, Protocol, Self, TypeVar

import torch
from pydantic import Field
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from wasi_export.errors import ConfigError, UsageError
from wasi_export.run_folder import RunFacts
from wasi_export.settings import Frozen
from wasi_export.subspace.gauge import GAUGE_PERIOD
from wasi_export.subspace.linear import BASIS_PERIOD
from wasi_export.training.profile_parts import PHASE, PartTimes, module_ranges, part_times

T = TypeVar("T")
Phases = Callable[[str], AbstractContextManager[None]]
"""Gives, for the name of a phase, the context in which it runs."""

PROFILE = "profile.json"
WARMUP_STEPS = 3  # the second is the first with all of the optimiser's state; one more for the allocator
TRACED_STEPS = math.lcm(BASIS_PERIOD, GAUGE_PERIOD)  # whole periods; events of a ViT-S: 63 MB a step


class PhaseTime(Frozen):
    """One phase of a step."""

    name: str
    wall_ms: float = Field(description="median over the measured steps")
    cpu_ms: float = Field(description="processor time of all threads of the process, median")
    share: float = Field(description="of the wall time of all measured steps")


class PartTime(Frozen):
    """What runs in one kind of module, or in a named range, by phase of the step."""

    name: str
    forward_ms: float
    backward_ms: float
    update_ms: float = Field(description="of clipping and update")


class Profile(Frozen):
    """A profile of training steps, as `--profile` writes it."""

    schema_version: Literal[1] = 1
    steps: int = Field(description="measured ones, without warm-up and without those under torch.profiler")
    device: str
    threads: int
    step_ms: float = Field(description="median wall time of a whole step")
    step_cpu_ms: float
    phases: tuple[PhaseTime, ...] = Field(description="in the order of a step")
    parts: tuple[PartTime, ...] = Field(description="shares under torch.profiler times the phases' means")


class ProfiledRun(Frozen):
    """A finished run and its profile, as `train --profile --json` prints them."""

    schema_version: Literal[1] = 1
    run: RunFacts
    profile: Profile


class Profiler(Protocol):
    """Measures the steps of a training loop; entered before the first and left after the last."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> None: ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Returns the context in which a phase of a step runs."""
        ...

    def loading(self, batches: Iterable[T]) -> Iterable[T]:
        """Returns the batches of an epoch; waiting for each is the phase `data` of its step."""
        ...

    def end_step(self) -> None:
        """Ends a step: what comes next is the next step's."""
        ...


def unmeasured(name: str) -> AbstractContextManager[None]:
    """Returns a context that does nothing."""
    return nullcontext()


class Unprofiled:
    """The `Profiler` that measures nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Returns a context that does nothing."""
        return nullcontext()

    def loading(self, batches: Iterable[T]) -> Iterable[T]:
        """Returns the batches."""
        return batches

    def end_step(self) -> None:
        """Does nothing."""


@dataclass
class _Times:
    """Wall and processor time in seconds of one step, whole and by phase."""

    wall: float = 0.0
    cpu: float = 0.0
    phases: dict[str, tuple[float, float]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0.0)))

    def rest(self) -> tuple[float, float]:
        """Returns the times that no phase has."""
        times = self.phases.values()
        return self.wall - sum(wall for wall, _ in times), self.cpu - sum(cpu for _, cpu in times)


class StepProfiler:
    """The `Profiler` that measures: the first steps warm up, the next run under torch.profiler."""

    def __init__(self, model: nn.Module, *, trace: Path | None = None) -> None:
        """Makes the profiler of a model's training; `trace` is where a Chrome trace is written."""
        self._model, self._trace = model, trace
        self._count = 0
        self._steps: list[_Times] = []
        self._step = _Times()
        self._began = 0.0, 0.0
        self._parts: PartTimes = {}
        self._traced = ExitStack()
        self._recording: profile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_recording()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what runs in the context; on a GPU, until its kernels are done."""
        before = self._now()
        with record_function(PHASE + name) if self._recording else nullcontext():
            yield
            after = self._now()
        wall, cpu = self._step.phases[name]
        self._step.phases[name] = wall + after[0] - before[0], cpu + after[1] - before[1]

    def loading(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches of an epoch, with the time to get each."""
        iterator, end = iter(batches), object()
        self._begin_step()
        while True:
            with self.phase("data"):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch  # type: ignore[misc]  # never `end`

    def end_step(self) -> None:
        """Keeps the times of the step that ends, and starts or stops torch.profiler where it is time to."""
        wall, cpu = self._now()
        self._step.wall, self._step.cpu = wall - self._began[0], cpu - self._began[1]
        self._count += 1
        if self._count > WARMUP_STEPS + TRACED_STEPS:
            self._steps.append(self._step)
        elif self._count == WARMUP_STEPS:
            self._start_recording()
        elif self._count == WARMUP_STEPS + TRACED_STEPS:
            self._stop_recording()
        self._begin_step()

    def result(self) -> Profile:
        """Returns the profile.

        Raises:
            ConfigError: there were too few steps.
        """
        if not self._steps:
            raise ConfigError(
                f"a profile needs {WARMUP_STEPS + TRACED_STEPS + 1} training steps or more, this took "
                f"{self._count}: train for more epochs or on more images"
            )
        return _summary(self._steps, self._parts, self._device)

    @property
    def _device(self) -> str:
        return next(self._model.parameters()).device.type

    def _begin_step(self) -> None:
        self._step, self._began = _Times(), self._now()

    def _now(self) -> tuple[float, float]:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter(), time.process_time()

    def _start_recording(self) -> None:
        # Events are kept until they are asked for: without it a warning says that they would be lost.
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device == "cuda" else [])]
        self._recording = self._traced.enter_context(profile(activities=activities, acc_events=True))
        self._traced.enter_context(module_ranges(self._model))

    def _stop_recording(self) -> None:
        if self._recording is None:
            return
        self._traced.close()
        events = self._recording.events()  # type: ignore[no-untyped-call]
        self._parts = part_times(events, on_device=self._device == "cuda")
        if self._trace is not None:
            try:
                self._trace.parent.mkdir(parents=True, exist_ok=True)
                self._recording.export_chrome_trace(os.fspath(self._trace))
            except (OSError, RuntimeError) as error:
                raise UsageError(f"cannot write the trace {self._trace}: {error}") from error
        self._recording = None


def _summary(steps: Sequence[_Times], parts: PartTimes, device: str) -> Profile:
    """Returns medians and shares of the steps."""
    whole = sum(step.wall for step in steps)
    names = list(dict.fromkeys(name for step in steps for name in step.phases))
    phases = [_phase(name, [step.phases[name] for step in steps], whole) for name in names]
    phases.append(_phase("other", [step.rest() for step in steps], whole))
    return Profile(
        steps=len(steps),
        device=device,
        threads=torch.get_num_threads(),
        step_ms=1e3 * median(step.wall for step in steps),
        step_cpu_ms=1e3 * median(step.cpu for step in steps),
        phases=tuple(phases),
        parts=_scaled(parts, {phase.name: 1e3 * phase.share * whole / len(steps) for phase in phases}),
    )


def _phase(name: str, times: Sequence[tuple[float, float]], whole: float) -> PhaseTime:
    return PhaseTime(
        name=name,
        wall_ms=1e3 * median(wall for wall, _ in times),
        cpu_ms=1e3 * median(cpu for _, cpu in times),
        share=sum(wall for wall, _ in times) / whole,
    )


def _scaled(parts: PartTimes, phase_ms: Mapping[str, float]) -> tuple[PartTime, ...]:
    """Returns the parts, slowest first, so that those of a phase add up to the phase's mean."""

    def milliseconds(part: str, *phases: str) -> float:
        return sum(
            parts[phase][part] / sum(parts[phase].values()) * phase_ms[phase]
            for phase in phases
            if part in parts.get(phase, {}) and phase in phase_ms
        )

    names = {name for phase in ("forward", "backward", "clipping", "update") for name in parts.get(phase, {})}
    rows = [
        PartTime(
            name=name,
            forward_ms=milliseconds(name, "forward"),
            backward_ms=milliseconds(name, "backward"),
            update_ms=milliseconds(name, "clipping", "update"),
        )
        for name in names
    ]
    rows.sort(key=lambda row: (row.forward_ms + row.backward_ms + row.update_ms, row.name), reverse=True)
    return tuple(rows)
