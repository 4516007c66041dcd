"""Training curves: accuracy and losses over the epochs of all stages, one after another."""

from collections.abc import Sequence

from wasi_export.report_page.inputs import Stage
from wasi_export.report_page.quantities import SPACE, percent, plain
from wasi_export.report_page.svg import Chart, Scale

WIDTH, HEIGHT = 480.0, 330.0
LEFT, RIGHT = 50.0, 12.0
UPPER, LOWER = (24.0, 150.0), (184.0, 292.0)
"""Top and bottom of the two panels."""
MARKED = 40
"""Up to so many epochs each has a mark."""

Values = Sequence[float | None]


def curves_chart(key: str, stages: Sequence[Stage]) -> str:
    """Returns the chart of all stages; each begins where the one before it ended."""
    epochs = [epoch for stage in stages for epoch in stage.epochs]
    accuracies = [epoch.val_accuracy for epoch in epochs]
    spread = max(accuracies) - min(accuracies) or 0.01
    low, high = min(accuracies) - 0.05 * spread, max(accuracies) + 0.08 * spread
    losses = [loss for e in epochs for loss in (e.train_loss, e.val_loss) if loss is not None]
    x = Scale(0.5, len(epochs) + 0.5, LEFT, WIDTH - RIGHT)
    y = Scale(max(0.0, low), min(1.0, high), UPPER[1], UPPER[0])
    z = Scale(0.0, 1.05 * max(losses, default=1.0), LOWER[1], LOWER[0])
    ends = (f"{stage.label} ends with {percent(stage.epochs[-1].val_accuracy)}" for stage in stages)
    chart = Chart(key, "Training curves", "; ".join(ends), width=WIDTH, height=HEIGHT)
    _draw_axes(chart, x, y, z)
    done = 0
    for stage in stages:
        places = [x(done + 1 + index) for index in range(len(stage.epochs))]
        if done:
            for top, bottom in (UPPER, LOWER):
                chart.line((x(done + 0.5), top - 6), (x(done + 0.5), bottom), "limit")
        css, marked = f"s-{stage.series}", len(epochs) <= MARKED
        _draw(chart, places, y, [epoch.val_accuracy for epoch in stage.epochs], css, marked=marked)
        _draw(chart, places, z, [epoch.val_loss for epoch in stage.epochs], css, marked=marked)
        trained = [epoch.train_loss for epoch in stage.epochs]
        _draw(chart, places, z, trained, f"{css} dashed", marked=marked and len(trained) == 1)
        done += len(stage.epochs)
    return chart.markup()


def _draw_axes(chart: Chart, x: Scale, y: Scale, z: Scale) -> None:
    for scale, top, factor, title, unit in (
        (y, UPPER[0], 100, "accuracy, validation", f"{SPACE}%"),
        (z, LOWER[0], 1, "loss", ""),
    ):
        for tick in scale.ticks(4):
            chart.line((LEFT, scale(tick)), (WIDTH - RIGHT, scale(tick)), "grid")
            label = plain(factor * tick, factor * scale.step(4)) + unit
            chart.text((LEFT - 6, scale(tick) + 4), label, "tick", anchor="end")
        chart.line((LEFT, scale.start), (WIDTH - RIGHT, scale.start), "axis")
        chart.text((LEFT, top - 9), title, "name")
    for tick in x.ticks(8):
        if tick == int(tick):
            chart.text((x(tick), LOWER[1] + 16), f"{tick:.0f}", "tick", anchor="middle")
    chart.text((WIDTH - RIGHT, HEIGHT - 4), "epoch", "tick", anchor="end")


def _draw(
    chart: Chart, places: Sequence[float], scale: Scale, values: Values, css: str, *, marked: bool
) -> None:
    """Draws one curve; a value that is not finite is None, and left out."""
    points = [(at, scale(value)) for at, value in zip(places, values, strict=True) if value is not None]
    chart.curve(points, f"line {css}")
    if marked:
        for point in points:
            chart.dot(point, 2.5, css)
