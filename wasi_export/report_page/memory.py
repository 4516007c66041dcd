"""Memory over a training step: what torch holds, kind upon kind, with the phases of the step below."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from wasi_export.report_page.inputs import TrainingStep
from wasi_export.report_page.quantities import SPACE, plain
from wasi_export.report_page.svg import Chart, Scale
from wasi_export.step_memory import Kind, Phase

WIDTH, HEIGHT = 480.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 24.0, 226.0
STRIP = (236.0, 18.0)
"""Top and height of the strip of phases."""
LETTER = 9.0
"""Room that a letter takes at most, on a narrow screen."""

KINDS: Mapping[Kind, str] = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations and workspace",
    "inputs": "batch",
}
"""From the bottom up: what stays is below what comes and goes."""
PHASES = ("forward", "backward", "clipping", "update")


@dataclass(frozen=True)
class AtPeak:
    """What one kind takes at the highest moment of each step, as text; the last row is the sum."""

    css: str
    label: str
    cells: tuple[str, ...]


def step_chart(key: str, step: TrainingStep, steps: Sequence[TrainingStep]) -> str:
    """Returns the chart of a step; its axis of memory is that of all steps."""
    curve, totals = step.curve, step.curve.total_bytes
    peak = max(range(len(totals)), key=totals.__getitem__)
    highest = max(max(other.curve.total_bytes) for other in steps) / 1e6
    ends = [curve.at_ms[-1], *(phase.end_ms for phase in curve.phases)]
    x = Scale(0.0, max(ends), LEFT, WIDTH - RIGHT)
    y = Scale(0.0, 1.1 * highest or 1.0, BOTTOM, TOP)
    words = (
        f"{_megabytes(totals[peak])} MB at most, in {_phase_at(curve.phases, curve.at_ms[peak])}: "
        + ", ".join(f"{label} {_megabytes(curve.held_bytes[kind][peak])}" for kind, label in KINDS.items())
    )
    chart = Chart(key, f"Memory over a step, {step.label}", words, width=WIDTH, height=HEIGHT)
    for tick in y.ticks(6):
        chart.line((LEFT, y(tick)), (WIDTH - RIGHT, y(tick)), "grid")
        chart.text((LEFT - 6, y(tick) + 4), plain(tick, y.step(6)), "tick", anchor="end")
    chart.text((0, TOP - 12), "MB", "tick")
    columns = [tuple(curve.held_bytes[kind][at] for kind in KINDS) for at in range(len(totals))]
    heights = [tuple(accumulate(column, initial=0)) for column in columns]
    places = [x(at) for at in curve.at_ms]
    for index, kind in enumerate(KINDS):
        lower = [(at, y(stack[index] / 1e6)) for at, stack in zip(places, heights, strict=True)]
        upper = [(at, y(stack[index + 1] / 1e6)) for at, stack in zip(places, heights, strict=True)]
        chart.area([*lower, *reversed(upper)], f"kind {kind}")
    chart.line((LEFT, BOTTOM), (WIDTH - RIGHT, BOTTOM), "axis")
    _draw_phases(chart, x, curve.phases)
    for tick in x.ticks(5):
        chart.text((x(tick), HEIGHT - 20), plain(tick, x.step(5)), "tick", anchor="middle")
    chart.text((WIDTH - RIGHT, HEIGHT - 4), "ms", "tick", anchor="end")
    place = places[peak], y(totals[peak] / 1e6)
    chart.dot(place, 3, "peak")
    side = "start" if place[0] < WIDTH / 2 else "end"
    label = f"peak {_megabytes(totals[peak])}{SPACE}MB"
    chart.text((place[0] + (7 if side == "start" else -7), place[1] - 6), label, "name", anchor=side)
    return chart.markup()


def at_peak(steps: Sequence[TrainingStep]) -> Iterator[AtPeak]:
    """Yields what each kind takes where a step holds most."""
    peaks = [step.curve.total_bytes.index(max(step.curve.total_bytes)) for step in steps]
    for kind, label in KINDS.items():
        held = (step.curve.held_bytes[kind][at] for step, at in zip(steps, peaks, strict=True))
        yield AtPeak(f"kind {kind}", label, tuple(map(_megabytes, held)))
    sums = (step.curve.total_bytes[at] for step, at in zip(steps, peaks, strict=True))
    yield AtPeak("", "all", tuple(map(_megabytes, sums)))


def phases_of(steps: Sequence[TrainingStep]) -> tuple[str, ...]:
    """Returns the names of the phases that the steps have, in the order of a step."""
    found = {phase.name for step in steps for phase in step.curve.phases}
    return tuple(name for name in PHASES if name in found)


def _draw_phases(chart: Chart, x: Scale, phases: Sequence[Phase]) -> None:
    """Draws the strip; a stretch that has room for it has its name in it."""
    top, tall = STRIP
    for name, group in groupby(phases, key=lambda phase: phase.name):
        stretch = list(group)
        begin, end = x(stretch[0].begin_ms), x(stretch[-1].end_ms)
        css = f"phase {name}" if name in PHASES else "phase"
        chart.bar(
            (begin, top), end - begin, tall, css, f"{name}, {stretch[-1].end_ms - stretch[0].begin_ms:.0f} ms"
        )
        if end - begin > LETTER * len(name):
            chart.text(((begin + end) / 2, top + 13), name, "within", anchor="middle")


def _phase_at(phases: Sequence[Phase], at_ms: float) -> str:
    return next((phase.name for phase in phases if phase.begin_ms <= at_ms <= phase.end_ms), "between phases")


def _megabytes(held: int) -> str:
    return f"{held / 1e6:,.1f}" if held < 100e6 else f"{held / 1e6:,.0f}"
