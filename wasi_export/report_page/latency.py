"""Latencies: a histogram for each model over one axis that begins at zero, and their ratios to the first."""

import math
from collections.abc import Sequence

from wasi_export.report import Latency
from wasi_export.report_page.inputs import ModelFigures
from wasi_export.report_page.quantities import SPACE, milliseconds, plain, shorten
from wasi_export.report_page.svg import Chart, Scale

WIDTH, ROW, BARS, BOTTOM = 480.0, 58.0, 30.0, 36.0
RATIO_ROW, VALUES = 36.0, 144.0
BINS = 60
BEYOND = 1.15
"""The axis ends at so many times the largest p99: one slow sample would make all others thin."""


def latency_chart(key: str, models: Sequence[ModelFigures]) -> tuple[str, str]:
    """Returns the chart of the models whose latency was measured, and a remark on what it leaves out."""
    rows = [(model, model.latency) for model in models if model.latency is not None]
    end = BEYOND * max((latency.p99_ms for _, latency in rows if math.isfinite(latency.p99_ms)), default=1.0)
    x = Scale(0.0, end or 1.0, 4.0, WIDTH - 4.0)
    counts = [_histogram(latency, x) for _, latency in rows]
    peak = max((max(count) / sum(count) for count in counts if sum(count)), default=1.0)
    height = len(rows) * ROW + BOTTOM
    words = (f"{model.label}: {_describe(latency)}" for model, latency in rows)
    chart = Chart(key, "Distribution of the latency", "; ".join(words), width=WIDTH, height=height)
    for tick in x.ticks(6):
        chart.line((x(tick), 6), (x(tick), height - BOTTOM), "grid")
        chart.text((x(tick), height - BOTTOM + 16), plain(tick, x.step(6)), "tick", anchor="middle")
    chart.text((WIDTH - 4, height - 4), "ms", "tick", anchor="end")
    for row, ((model, latency), count) in enumerate(zip(rows, counts, strict=True)):
        base = (row + 1) * ROW - 4
        chart.text((4, base - BARS - 8), shorten(model.label), "name")
        chart.text((WIDTH - 4, base - BARS - 8), _describe(latency), "value", anchor="end")
        wide = (x.end - x.start) / BINS
        for index, number in enumerate(count):
            if number:
                tall = max(1.5, BARS * number / sum(count) / peak)
                corner = (x.start + index * wide + 0.4, base - tall)
                chart.bar(corner, wide - 0.8, tall, model.css)
        chart.line((x.start, base), (x.end, base), "axis")
        chart.line((x(latency.p50_ms), base - BARS - 3), (x(latency.p50_ms), base + 3), "median")
        for tail in (latency.p90_ms, latency.p99_ms):
            chart.line((x(tail), base - 7), (x(tail), base + 3), "tail")
    beyond = sum(sample > x.high for _, latency in rows for sample in latency.samples_ms)
    remark = f"{beyond} of the samples {'lie' if beyond > 1 else 'lies'} beyond the axis." if beyond else ""
    return chart.markup(), remark


def ratio_chart(key: str, models: Sequence[ModelFigures], threshold: float | None) -> str:
    """Returns the ratios to the first model with their intervals and the noise around 1; empty without any.

    The threshold is that of the ratio of the second model, the bundle.
    """
    known = [(model, model.latency) for model in models if model.latency is not None]
    rows, floors = known[1:], [la.noise_floor for _, la in known if la.noise_floor is not None]
    if not rows:
        return ""
    noise = max(floors, default=0.0)
    ends = [
        end for _, la in rows for end in (la.ratio_to_first, *(la.ratio_interval or ())) if math.isfinite(end)
    ]
    x = Scale(0.0, 1.04 * max([1.0 + noise, threshold or 0.0, *ends]), 4.0, WIDTH - 4.0)
    height = len(rows) * RATIO_ROW + BOTTOM
    words = "; ".join(f"{model.label}: {describe_ratio(la)}" for model, la in rows)
    chart = Chart(key, f"Latency over that of {known[0][0].label}", words, width=WIDTH, height=height)
    bottom = height - BOTTOM
    if noise:
        chart.bar(
            (x(1 - noise), 2), x(1 + noise) - x(1 - noise), bottom - 2, "noise", f"noise, 1 ± {noise:.3f}"
        )
    for tick in x.ticks(6):
        chart.line((x(tick), 2), (x(tick), bottom), "grid")
        chart.text((x(tick), bottom + 16), plain(tick, x.step(6)), "tick", anchor="middle")
    chart.line((x(1.0), 2), (x(1.0), bottom), "axis")
    if threshold is not None:
        chart.line((x(threshold), 2), (x(threshold), bottom), "limit")
    chart.text(
        (WIDTH - 4, height - 4), f"times the latency of {shorten(known[0][0].label)}", "tick", anchor="end"
    )
    for row, (model, latency) in enumerate(rows):
        base = (row + 1) * RATIO_ROW - 8
        chart.text((4, base - 12), shorten(model.label, 16), "name")
        chart.text((VALUES, base - 12), describe_ratio(latency), "value")
        low, high = latency.ratio_interval or (latency.ratio_to_first,) * 2
        chart.line((x(low), base), (x(high), base), f"whisker {model.css}")
        for end in (low, high):
            chart.line((x(end), base - 4), (x(end), base + 4), f"whisker {model.css}")
        chart.dot((x(latency.ratio_to_first), base), 4, model.css, describe_ratio(latency))
    return chart.markup()


def describe_ratio(latency: Latency) -> str:
    """Returns the ratio with its confidence interval, where there is one."""
    if latency.ratio_interval is None:
        return f"{latency.ratio_to_first:.3f}"
    low, high = latency.ratio_interval
    return f"{latency.ratio_to_first:.3f} ({low:.3f}–{high:.3f})"


def _describe(latency: Latency) -> str:
    p50, p90, p99 = map(milliseconds, (latency.p50_ms, latency.p90_ms, latency.p99_ms))
    return f"p50 {p50} · p90 {p90} · p99 {p99}{SPACE}ms"


def _histogram(latency: Latency, x: Scale) -> list[int]:
    """Returns how many samples are in each of the bins of the axis."""
    counts = [0] * BINS
    for sample in latency.samples_ms:
        if 0 <= sample < x.high:
            counts[min(BINS - 1, int(sample / x.high * BINS))] += 1
    return counts
