"""The distribution of latencies: a histogram for each model, over one axis that begins at zero."""

import math
from collections.abc import Sequence

from wasi_export.report import Latency
from wasi_export.report_page.inputs import ModelFigures
from wasi_export.report_page.quantities import SPACE, milliseconds, plain, shorten
from wasi_export.report_page.svg import Chart, Scale

WIDTH, ROW, BARS, BOTTOM = 480.0, 58.0, 30.0, 36.0
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
