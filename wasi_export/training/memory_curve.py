"""What torch holds over one training step, counted operator by operator while real steps run.

Exact for what torch allocates, and the same in every run; the time is that of a step whose every operator is
looked at, which is longer than usual where operators are small. What kernels take for themselves is not in
it: the peak of a process (`memory.py`) is higher.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from wasi_export.step_memory import Phase, StepCurve
from wasi_export.training.accounting import KINDS
from wasi_export.training.memory import StepJob, make_model
from wasi_export.training.predict import count_steps

MOMENTS = 240  # more than a page has room for

Moment = tuple[float, tuple[int, ...]]
"""A time, and bytes by kind."""


def record_step_curve(job: StepJob) -> StepCurve:
    """Returns what torch holds over the second of two steps with random weights and images, in this process.

    The second is the first with all of the optimiser's state.
    """
    spans: list[tuple[str, float, float]] = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spans.append((name, began, time.perf_counter()))

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        account = count_steps(job, make_model(job), phase=phase)
    start, end = (finish for name, _, finish in spans if name == "update")
    moments = [(at, held) for at, held in account.moments if start < at <= end]
    kept = _highest(moments, start, end)
    return StepCurve(
        batch_size=job.batch_size,
        phases=tuple(
            Phase(name=name, begin_ms=1e3 * (began - start), end_ms=1e3 * (finish - start))
            for name, began, finish in spans
            if began >= start
        ),
        at_ms=tuple(1e3 * (at - start) for at, _ in kept),
        held_bytes={kind: tuple(held[index] for _, held in kept) for index, kind in enumerate(KINDS)},
    )


def _highest(moments: Sequence[Moment], start: float, end: float) -> list[Moment]:
    """Returns the highest moment of each of `MOMENTS` equal stretches of time; not every one has a moment."""
    highest: dict[int, Moment] = {}
    for moment in moments:
        stretch = int(MOMENTS * (moment[0] - start) / (end - start))
        if stretch not in highest or sum(moment[1]) > sum(highest[stretch][1]):
            highest[stretch] = moment
    return list(highest.values())
