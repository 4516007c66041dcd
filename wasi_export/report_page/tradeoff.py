"""Accuracy over latency: a point for each model, and the field in which the thresholds hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wasi_export.report import Report
from wasi_export.report_page.inputs import DENSE, ModelFigures
from wasi_export.report_page.quantities import SPACE, milliseconds, percent, plain, shorten
from wasi_export.report_page.svg import Chart, Point, Scale

WIDTH, HEIGHT = 480.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 12.0, 12.0, 40.0
LETTER, LINE = 8.4, 17.0
"""Room that a letter and a line take at most, on a narrow screen."""


@dataclass(frozen=True)
class Limits:
    """Thresholds of the bundle's graph in the units of the chart; None: there is none."""

    accuracy: float | None
    latency_ms: float | None

    @classmethod
    def of(cls, report: Report, models: Iterable[ModelFigures]) -> "Limits":
        """Returns the thresholds of a report, those against the dense model made absolute."""
        found = {check.name: check.threshold for check in report.checks}
        dense = next((model for model in models if model.name == DENSE), None)
        floors = [found.get("accuracy")]
        ratio, latest = found.get("latency ratio"), None
        if dense is not None:
            drop = found.get("accuracy drop")
            floors.append(None if drop is None or dense.accuracy is None else dense.accuracy - drop)
            if ratio is not None and dense.latency is not None:
                latest = ratio * dense.latency.p50_ms
        return cls(max((floor for floor in floors if floor is not None), default=None), latest)


def tradeoff_chart(key: str, models: Sequence[ModelFigures], limits: Limits) -> str:
    """Returns the chart of the models of which both are known."""
    marks = [
        (model, model.accuracy, model.latency.p50_ms)
        for model in models
        if model.accuracy is not None and model.latency is not None
    ]
    heights = [accuracy for _, accuracy, _ in marks]
    if limits.accuracy is not None:
        heights.append(limits.accuracy)
    pad = max(0.1 * (max(heights) - min(heights)), 0.002)
    widths = [ms for _, _, ms in marks] + ([] if limits.latency_ms is None else [limits.latency_ms])
    x = Scale(0.0, 1.12 * max(widths) or 1.0, LEFT, WIDTH - RIGHT)
    y = Scale(max(0.0, min(heights) - pad), min(1.0, max(heights) + 2 * pad), HEIGHT - BOTTOM, TOP)
    words = (f"{m.label}: {percent(accuracy)} at {milliseconds(ms)} ms" for m, accuracy, ms in marks)
    chart = Chart(key, "Accuracy over latency", "; ".join(words), width=WIDTH, height=HEIGHT)
    _draw_limits(chart, x, y, limits)
    _draw_axes(chart, x, y)
    places = [(x(ms), y(accuracy)) for _, accuracy, ms in marks]
    spans = [_span(model, x, place) for (model, _, _), place in zip(marks, places, strict=True)]
    taken = [(low, up - 7, high, up + 7) for (low, high), (_, up) in zip(spans, places, strict=True)]
    for (model, accuracy, ms), place, span in zip(marks, places, spans, strict=True):
        chart.line((span[0], place[1]), (span[1], place[1]), f"whisker {model.css}")
        hint = f"{model.label}: {percent(accuracy)}, {milliseconds(ms)} ms"
        chart.dot(place, 6, model.css, hint)
        words_at, anchor = _room(place, span, shorten(model.label, 20), taken)
        chart.text(words_at, shorten(model.label, 20), "name", anchor=anchor)
    return chart.markup()


def _draw_limits(chart: Chart, x: Scale, y: Scale, limits: Limits) -> None:
    """Shades where a threshold of the bundle is missed."""
    if limits.accuracy is not None:
        floor = y(limits.accuracy)
        chart.bar((LEFT, floor), WIDTH - RIGHT - LEFT, HEIGHT - BOTTOM - floor, "missed")
        chart.line((LEFT, floor), (WIDTH - RIGHT, floor), "limit")
    if limits.latency_ms is not None:
        latest = x(limits.latency_ms)
        bottom = HEIGHT - BOTTOM if limits.accuracy is None else y(limits.accuracy)
        chart.bar((latest, TOP), WIDTH - RIGHT - latest, bottom - TOP, "missed")
        chart.line((latest, TOP), (latest, HEIGHT - BOTTOM), "limit")


def _draw_axes(chart: Chart, x: Scale, y: Scale) -> None:
    for tick in y.ticks(5):
        chart.line((LEFT, y(tick)), (WIDTH - RIGHT, y(tick)), "grid")
        label = plain(100 * tick, 100 * y.step(5))
        chart.text((LEFT - 6, y(tick) + 4), f"{label}{SPACE}%", "tick", anchor="end")
    for tick in x.ticks(5):
        chart.line((x(tick), TOP), (x(tick), HEIGHT - BOTTOM), "grid")
        chart.text((x(tick), HEIGHT - BOTTOM + 17), plain(tick, x.step(5)), "tick", anchor="middle")
    chart.line((LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM), "axis")
    chart.text((WIDTH - RIGHT, HEIGHT - 4), "latency p50, ms", "tick", anchor="end")


def _span(model: ModelFigures, x: Scale, place: Point) -> tuple[float, float]:
    """Returns from where to where a mark reaches, with its quartiles."""
    quartiles = model.quartiles_ms
    ends = (place[0],) if quartiles is None else (x(quartiles[0]), x(quartiles[1]))
    return min(place[0] - 7, *ends), max(place[0] + 7, *ends)


def _room(
    place: Point, span: tuple[float, float], words: str, taken: list[tuple[float, float, float, float]]
) -> tuple[Point, str]:
    """Returns where the label of a mark covers nothing that is taken, and its anchor; takes that place."""
    wide, (left, up) = LETTER * len(words), place
    candidates = (
        ((span[1] + 5, up + 4), "start"), ((span[0] - 5, up + 4), "end"), ((left, up - 12), "middle"),
        ((left, up + 22), "middle"), ((left + 8, up - 14), "start"), ((left - 8, up - 14), "end"),
        ((left + 8, up + 24), "start"), ((left - 8, up + 24), "end"), ((left, up - 30), "middle"),
    )  # fmt: skip
    for (at, base), anchor in candidates:
        begin = at - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        box = (begin, base - LINE + 4, begin + wide, base + 4)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
        free = all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in taken)
        if inside and free:
            taken.append(box)
            return (at, base), anchor
    return candidates[0]


def has_tradeoff(models: Iterable[ModelFigures]) -> bool:
    """Returns whether the chart would hold two points or more; fewer compare nothing."""
    return sum(model.accuracy is not None and model.latency is not None for model in models) > 1
