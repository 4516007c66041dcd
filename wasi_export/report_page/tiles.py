"""What is seen first: a tile for each thing that matters, with its threshold and the dense model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from wasi_export.report import Check, Report
from wasi_export.report_page.inputs import DENSE, OWN, ModelFigures, PageInputs
from wasi_export.report_page.quantities import SPACE, megabytes, millions, milliseconds, points

NO_LIMIT = ("", "")


@dataclass(frozen=True)
class Tile:
    """One figure of what was checked, beside the dense model's, and the threshold for it."""

    title: str
    value: str
    unit: str = ""
    note: str = ""
    share: float | None = None
    """Of the dense model's, drawn as a bar."""
    limit: str = ""
    status: str = ""
    """Of the check that has the threshold."""


def tiles_of(inputs: PageInputs) -> tuple[Tile, ...]:
    """Returns the tiles of what is known."""
    models = {model.name: model for model in inputs.figures}
    report, own, dense = inputs.reports[0], models.get(OWN), models.get(DENSE)
    checks = {check.name: check for check in report.checks}
    tiles = [] if own is None else [*_measured(own, dense, checks)]
    tiles += _counted(report, checks)
    tiles += [] if own is None else [*_sizes(own, dense, checks)]
    parity = checks.get("parity error")
    if parity is not None and parity.value is not None and len(tiles) < 5:
        limit = _limit(parity, "≤", lambda value: f"{value:.2g}")
        tiles.append(Tile("parity error", f"{parity.value:.2g}", "", "of the output scale", None, *limit))
    return tuple(tiles)


def _measured(own: ModelFigures, dense: ModelFigures | None, checks: Mapping[str, Check]) -> Iterator[Tile]:
    """Yields accuracy and latency."""
    if own.accuracy is not None:
        note = ""
        if dense is not None and dense.accuracy is not None:
            note = f"{points(own.accuracy - dense.accuracy)} points on {dense.label}"
        floor = _limit(checks.get("accuracy"), "≥", lambda value: f"{100 * value:.4g}{SPACE}%")
        drop = _limit(checks.get("accuracy drop"), "drop ≤", lambda value: f"{100 * value:.3g} points")
        yield Tile("accuracy", f"{100 * own.accuracy:.2f}", "%", note, None, *_both(floor, drop))
    if own.latency is not None:
        share = None if dense is None else own.latency.ratio_to_first
        name = "the dense model" if dense is None else dense.label
        limit = _limit(checks.get("latency ratio"), "≤", lambda value: f"{value:g} of {name}")
        value = milliseconds(own.latency.p50_ms)
        yield Tile("latency, p50", value, "ms", _of_dense(share, dense), share, *limit)


def _counted(report: Report, checks: Mapping[str, Check]) -> Iterator[Tile]:
    """Yields what an emulator counted."""
    for count in report.instructions:
        if count.model != OWN:
            continue
        first = report.instructions[0].model
        share = None if first == OWN else count.ratio_to_first
        note = "of one run, emulated" if share is None else f"{share:.3f} of {first}, emulated"
        limit = _limit(
            checks.get(f"instructions of {OWN}"), "growth ≤", lambda value: f"{100 * value:g}{SPACE}%"
        )
        yield Tile("instructions", f"{count.total / 1e6:.1f}", "M", note, share, *limit)
        if count.estimate_ms is None:
            continue
        low, high = count.estimate_ms
        yield Tile("estimate, Raspberry Pi 5", f"{low:.2g}–{high:.2g}", "ms", "not measured; one thread")


def _sizes(own: ModelFigures, dense: ModelFigures | None, checks: Mapping[str, Check]) -> Iterator[Tile]:
    """Yields file, parameters and memory."""
    if own.size_mb is not None:
        share = _share(own.size_mb, dense.size_mb if dense else None)
        limit = _limit(checks.get("size"), "≤", lambda value: f"{value:g}{SPACE}MB")
        yield Tile("model.onnx", megabytes(own.size_mb), "MB", _of_dense(share, dense), share, *limit)
    if own.parameters is not None:
        share = _share(own.parameters, dense.parameters if dense else None)
        number, _, unit = millions(own.parameters).partition(SPACE)
        yield Tile("parameters", number, unit, _of_dense(share, dense), share)
    if own.step_memory_mb is not None:
        share = _share(own.step_memory_mb, dense.step_memory_mb if dense else None)
        value = f"{own.step_memory_mb:,.0f}"
        yield Tile("training step, peak", value, "MB", _of_dense(share, dense), share)


def _share(own: float, dense: float | None) -> float | None:
    return own / dense if dense else None


def _of_dense(share: float | None, dense: ModelFigures | None) -> str:
    return "" if share is None or dense is None else f"{share:.3f} of {dense.label}"


def _limit(check: Check | None, words: str, form: Callable[[float], str]) -> tuple[str, str]:
    """Returns a threshold in words and the status of its check; empty without one."""
    if check is None or check.threshold is None:
        return NO_LIMIT
    return f"{words}{SPACE}{form(check.threshold)}", check.status


def _both(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, str]:
    """Returns two thresholds as one, with the worse status."""
    order = ("", "info", "passed", "no data", "undecided", "failed")
    words = ", ".join(filter(None, (first[0], second[0])))
    return words, max(first[1], second[1], key=order.index)
