"""Rank, energy kept and time of the layers: a chart for all layers of one kind, in the order of the model.

Energy is drawn on an axis of nines: 90 %, 99 %, 99.9 %, each as far from the next, for a layer that loses a
tenth of another's energy would not be seen to differ from it on a plain one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from wasi_export.ranks import LayerPlan, break_even_rank
from wasi_export.report import LayerTime, Report
from wasi_export.report_page.quantities import SPACE, milliseconds, percent, plain
from wasi_export.report_page.svg import Chart, Scale

WIDTH, LEFT, RIGHT = 280.0, 64.0, 6.0
RANKS, ENERGIES, TIMES = (24.0, 108.0), (146.0, 206.0), (244.0, 304.0)
"""Top and bottom of each panel."""
MISSING = "–"
NINES = 6
"""Energy is told apart up to 99.9999 %."""


@dataclass(frozen=True)
class LayerGroup:
    """The layers whose names differ in nothing but numbers, as `blocks.*.mlp.fc1`."""

    pattern: str
    layers: tuple[LayerPlan, ...]
    numbers: tuple[str, ...]
    """What tells each of them from the others."""

    @property
    def shape(self) -> str:
        """Inputs and outputs, as a range where they differ."""
        ins = _span(layer.in_features for layer in self.layers)
        return f"{ins} → {_span(layer.out_features for layer in self.layers)}"


def group_layers(layers: Iterable[LayerPlan]) -> tuple[LayerGroup, ...]:
    """Returns the groups in which a layer was factored, or folded after it, in the order of the model."""
    found: dict[str, list[tuple[LayerPlan, str]]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        pattern = ".".join("*" if part.isdecimal() else part for part in parts)
        number = ".".join(part for part in parts if part.isdecimal())
        found.setdefault(pattern, []).append((layer, number))
    return tuple(
        LayerGroup(pattern, tuple(layer for layer, _ in members), tuple(number for _, number in members))
        for pattern, members in found.items()
        if any(layer.rank is not None or layer.factored_ms is not None for layer, _ in members)
    )


def layer_chart(
    key: str, group: LayerGroup, layers: Sequence[LayerPlan], times: Mapping[str, LayerTime]
) -> str:
    """Returns the chart of a group; its axis of energies is that of all layers, and times are by layer."""
    timed = any(layer.name in times for layer in group.layers)
    bottom = TIMES[1] if timed else ENERGIES[1]
    count = len(group.layers)
    x = Scale(0.0, count, LEFT, WIDTH - RIGHT)
    slot = (x.end - x.start) / count
    words = "; ".join(describe_layer(layer, times.get(layer.name)) for layer in group.layers)
    chart = Chart(key, f"Layers {group.pattern}", words, width=WIDTH, height=bottom + 22)
    limits = [break_even_rank(layer.out_features, layer.in_features) for layer in group.layers]
    y = Scale(0.0, 1.05 * max([*limits, *(layer.rank or 0 for layer in group.layers)]), RANKS[1], RANKS[0])
    chart.text((0, RANKS[0] - 12), "rank", "name")
    _grid(chart, y, [(tick, plain(tick, y.step(3))) for tick in y.ticks(3)])
    chart.text((0, ENERGIES[0] - 14), "energy kept", "name")
    nines = _nines_axis(layers)
    _grid(chart, nines, [(tick, _nines_label(tick)) for tick in _whole(nines)])
    wide = max(1.0, min(0.72 * slot, 16.0))
    found = [times[layer.name] for layer in group.layers if layer.name in times]
    longest = max((ms or 0.0 for time in found for ms in (time.baseline_ms, time.bundle_ms)), default=0.0)
    z = Scale(0.0, 1.08 * longest or 1.0, TIMES[1], TIMES[0])
    if timed:
        chart.text((0, TIMES[0] - 14), "time, ms", "name")
        _grid(chart, z, [(tick, plain(tick, z.step(3))) for tick in z.ticks(3)])
    for index, (layer, limit) in enumerate(zip(group.layers, limits, strict=True)):
        middle = x(index + 0.5)
        time = times.get(layer.name)
        hint = describe_layer(layer, time)
        chart.bar((middle - wide / 2, y(limit)), wide, RANKS[1] - y(limit), "ghost", hint)
        if layer.rank is not None:
            chart.bar((middle - wide / 2, y(layer.rank)), wide, RANKS[1] - y(layer.rank), "s-own", hint)
            if layer.energy is not None:
                chart.dot((middle, nines(_nines(layer.energy))), 3, "s-own", hint)
        for ms, css in () if time is None else ((time.baseline_ms, "s-dense"), (time.bundle_ms, "s-own")):
            if ms is not None:
                chart.dot((middle, z(ms)), 3, css, hint)
    every = max(1, math.ceil(max(map(len, group.numbers)) * 8 * count / (x.end - x.start)))
    for index in range(0, count, every):
        chart.text((x(index + 0.5), bottom + 15), group.numbers[index], "tick", anchor="middle")
    return chart.markup()


def describe_layer(layer: LayerPlan, time: LayerTime | None) -> str:
    """Returns in words what became of a layer."""
    words = f"{layer.name}, {layer.in_features} → {layer.out_features}: "
    if layer.rank is None:
        words += layer.reason
    else:
        words += f"rank {layer.rank}"
        words += "" if layer.energy is None else f", energy {percent(layer.energy, 4)}"
    if time is None:
        return words
    own, dense = (MISSING if ms is None else f"{ms:.3f} ms" for ms in (time.bundle_ms, time.baseline_ms))
    return f"{words}; {own}, dense {dense}"


def times_of(report: Report) -> dict[str, LayerTime]:
    """Returns the times of a report by layer, without those of the rest."""
    return {time.layer: time for time in report.layers if time.layer}


def describe_times(times: Iterable[LayerTime]) -> str:
    """Returns in words what all layers take that both models have; empty where there is none."""
    pairs = [
        (t.bundle_ms, t.baseline_ms) for t in times if t.bundle_ms is not None and t.baseline_ms is not None
    ]
    own, dense = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    if not dense:
        return ""
    return f"together they take {milliseconds(own)}{SPACE}ms, dense {milliseconds(dense)}{SPACE}ms"


def time_rows(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """Yields the cells of a table of times: layer, dense, low-rank, and the ratio."""
    for time in report.layers:
        dense, own = (MISSING if ms is None else f"{ms:.3f}" for ms in (time.baseline_ms, time.bundle_ms))
        ratio = MISSING
        if time.bundle_ms is not None and time.baseline_ms:
            ratio = f"{time.bundle_ms / time.baseline_ms:.3f}"
        yield time.layer or "all else", dense, own, ratio


def _grid(chart: Chart, scale: Scale, ticks: Iterable[tuple[float, str]]) -> None:
    for tick, label in ticks:
        chart.line((LEFT, scale(tick)), (WIDTH - RIGHT, scale(tick)), "grid")
        chart.text((LEFT - 5, scale(tick) + 4), label, "tick", anchor="end")
    chart.line((LEFT, scale.start), (WIDTH - RIGHT, scale.start), "axis")


def _nines(energy: float) -> float:
    """Returns 1 for 90 %, 2 for 99 % and so on."""
    return min(float(NINES), max(0.0, -math.log10(max(1 - energy, 10.0**-NINES))))


def _nines_axis(layers: Iterable[LayerPlan]) -> Scale:
    values = [_nines(la.energy) for la in layers if la.rank is not None and la.energy is not None] or [0, 1]
    low, high = math.floor(min(values)), math.ceil(max(values))
    return Scale(low, max(high, low + 1), ENERGIES[1], ENERGIES[0])


def _nines_label(tick: float) -> str:
    return f"{100 * (1 - 10**-tick):.10g}{SPACE}%"


def _whole(axis: Scale) -> tuple[float, ...]:
    """Returns the whole numbers of an axis, every second one where there are many."""
    every = 1 if axis.high - axis.low <= 3 else 2
    return tuple(float(tick) for tick in range(int(axis.low), int(axis.high) + 1, every))


def _span(numbers: Iterable[int]) -> str:
    known = sorted(set(numbers))
    return str(known[0]) if len(known) == 1 else f"{known[0]}–{known[-1]}"
