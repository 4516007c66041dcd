"""The models beside one another: a table of their figures, and their sizes and memory as bars."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wasi_export.report import Latency
from wasi_export.report_page.inputs import ModelFigures
from wasi_export.report_page.quantities import megabytes, milliseconds, points

NONE = "–"


@dataclass(frozen=True)
class Column:
    """One figure of all models; the texts of its cells, and what stands small below them."""

    title: str
    unit: str
    cells: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """One model's figure, and its share of the largest."""

    label: str
    css: str
    text: str
    share: float


@dataclass(frozen=True)
class BarList:
    """One figure of all models that have it, as bars."""

    title: str
    unit: str
    bars: tuple[Bar, ...]


def columns_of(models: Sequence[ModelFigures]) -> tuple[Column, ...]:
    """Returns the columns of the table in which at least one model has a figure."""
    first = models[0].accuracy
    gains = [
        ""
        if model is models[0] or model.accuracy is None or first is None
        else points(model.accuracy - first)
        for model in models
    ]
    tails = _of_latency(models, lambda latency: f"p99 {milliseconds(latency.p99_ms)}")
    spreads = _of_latency(models, _interval)
    ratios = _of_latency(models, lambda latency: f"{latency.ratio_to_first:.3f}")
    columns = (
        Column(
            "accuracy", "%", _texts([m.accuracy for m in models], lambda v: f"{100 * v:.2f}"), tuple(gains)
        ),
        Column("latency, p50", "ms", _of_latency(models, lambda la: milliseconds(la.p50_ms)), tails),
        Column("latency ratio", "", ratios, ("", *spreads[1:])),
        Column("ONNX file", "MB", _texts([m.size_mb for m in models], megabytes), ()),
        Column("training step", "MB", _texts([m.step_memory_mb for m in models], lambda v: f"{v:,.0f}"), ()),
        Column("parameters", "", _texts([m.parameters for m in models], lambda v: f"{v:,.0f}"), ()),
    )
    return tuple(column for column in columns if set(column.cells) != {NONE})


def bars_of(models: Sequence[ModelFigures], step_batch: int | None) -> tuple[BarList, ...]:
    """Returns size and memory as bars, where two models or more have them."""
    batch = f", batch {step_batch}" if step_batch else ""
    memory = [None if model.latency is None else model.latency.peak_rss_mb for model in models]
    load = [None if model.latency is None else model.latency.load_ms for model in models]
    lists = (
        _bars("ONNX file", "MB", models, [model.size_mb for model in models], megabytes),
        _bars("Peak of a process that runs one batch", "MB", models, memory, lambda v: f"{v:,.0f}"),
        _bars("Time to load", "ms", models, load, milliseconds),
        _bars(
            f"Peak of a training step{batch}", "MB", models, [model.step_memory_mb for model in models],
            lambda v: f"{v:,.0f}",
        ),
    )  # fmt: skip
    return tuple(found for found in lists if len(found.bars) > 1)


def _texts(values: Sequence[float | None], form: Callable[[float], str]) -> tuple[str, ...]:
    return tuple(NONE if value is None else form(value) for value in values)


def _of_latency(models: Sequence[ModelFigures], form: Callable[[Latency], str]) -> tuple[str, ...]:
    return tuple(NONE if model.latency is None else form(model.latency) for model in models)


def _interval(latency: Latency) -> str:
    """Returns between what the ratio lies: its confidence interval, or nothing."""
    return "" if latency.ratio_interval is None else "{:.3f}–{:.3f}".format(*latency.ratio_interval)


def _bars(
    title: str,
    unit: str,
    models: Sequence[ModelFigures],
    values: Sequence[float | None],
    form: Callable[[float], str],
) -> BarList:
    known = [(model, value) for model, value in zip(models, values, strict=True) if value is not None]
    largest = max((value for _, value in known), default=0.0) or 1.0
    return BarList(
        title, unit, tuple(Bar(m.label, m.css, form(value), value / largest) for m, value in known)
    )
