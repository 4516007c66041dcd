"""The page: every part that there is data for, put into the template. The same inputs give the same bytes."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from wasi_export._extras import require
from wasi_export.errors import ExitCode
from wasi_export.ranks import LayerPlan
from wasi_export.report import Check, Report, Status
from wasi_export.report_page.answers import CARDS, Answers, answers_of
from wasi_export.report_page.comparison import bars_of, columns_of
from wasi_export.report_page.curves import curves_chart
from wasi_export.report_page.gaps import gaps_of
from wasi_export.report_page.inputs import PageInputs, Stage, figures_of
from wasi_export.report_page.latency import latency_chart, ratio_chart
from wasi_export.report_page.layers import describe_times, group_layers, layer_chart, time_rows, times_of
from wasi_export.report_page.memory import at_peak, phases_of, step_chart
from wasi_export.report_page.quantities import SPACE, percent
from wasi_export.report_page.tiles import tiles_of
from wasi_export.report_page.tradeoff import Limits, has_tradeoff, tradeoff_chart
from wasi_export.views import (
    COUNTED,
    INSTRUCTION_COLUMNS,
    LATENCY_COLUMNS,
    capitalized,
    check_values,
    describe_board,
    describe_measurement,
    instruction_row,
    latency_row,
)

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
"""Characters that are no XML, or that turn the direction of the text after them."""
MARKS: Mapping[Status, str] = {"passed": "✓", "failed": "✕", "undecided": "≈", "no data": "?", "info": "·"}


@dataclass(frozen=True)
class Machine:
    """What the template shows of one report beside its checks."""

    report: Report
    place: str
    status: str
    """Of the report as a whole, in the words of a check."""
    latency: str = ""
    """The chart; empty where no latency was measured."""
    remark: str = ""
    ratio: str = ""
    """The chart of the ratios of latencies."""
    answers: Answers | None = None


def render_page(inputs: PageInputs) -> bytes:
    """Returns the HTML file.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    text: str = _environment().get_template("page.html.j2").render(_context(inputs))
    return UNSEEN.sub("\ufffd", text).encode()


@functools.cache
def _environment() -> Any:
    """Returns what has the templates, each compiled once."""
    jinja2 = require("jinja2", extra="report")
    return jinja2.Environment(
        loader=jinja2.PackageLoader("wasi_export.report_page", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _context(inputs: PageInputs) -> dict[str, Any]:
    """Returns what the template reads."""
    first = inputs.reports[0]
    machines = [_machine(index, report, inputs) for index, report in enumerate(inputs.reports)]
    groups = group_layers(inputs.layers)
    times = times_of(first)
    return {
        "title": first.model,
        "status_name": _worst([machine.status for machine in machines]),
        "verdict": _verdict(machines),
        "counts": _count_checks(inputs.reports),
        "facts": inputs.facts,
        "machines": machines,
        "tiles": tiles_of(inputs),
        "columns": columns_of(inputs.figures),
        "models": inputs.figures,
        "bars": bars_of(inputs.figures, inputs.step_batch),
        "tradeoff": _tradeoff(inputs),
        "curves": curves_chart("curves", inputs.stages) if inputs.stages else "",
        "stages": [_describe_stage(stage) for stage in inputs.stages],
        "stage_labels": [(stage.label, stage.series) for stage in inputs.stages],
        "groups": [
            (group, layer_chart(f"layers-{index}", group, inputs.layers, times))
            for index, group in enumerate(groups)
        ],
        "layers": inputs.layers,
        "layers_total": _describe_layers(inputs.layers),
        "kept_dense": list(_kept_dense(inputs.layers)),
        "times": times,
        "times_total": describe_times(times[layer.name] for layer in inputs.layers if layer.name in times),
        "time_rows": time_rows,
        "cards": CARDS,
        "step_charts": [
            (step, step_chart(f"step-{index}", step, inputs.steps)) for index, step in enumerate(inputs.steps)
        ],
        "step_peaks": list(at_peak(inputs.steps)) if inputs.steps else [],
        "phases": phases_of(inputs.steps),
        "gaps": list(gaps_of(inputs)),
        "mark": MARKS.__getitem__,
        "check_values": check_values,
        "threshold_words": _threshold_words,
        "describe_board": describe_board,
        "describe_measurement": describe_measurement,
        "instruction_row": instruction_row,
        "instruction_columns": INSTRUCTION_COLUMNS[0],
        "latency_row": latency_row,
        "latency_columns": LATENCY_COLUMNS[0],
        "counted": COUNTED,
        "percent": percent,
    }


def _machine(index: int, report: Report, inputs: PageInputs) -> Machine:
    models = inputs.figures if index == 0 else figures_of(report)
    latency, remark, ratio = "", "", ""
    if report.latency:
        thresholds = {check.name: check.threshold for check in report.checks}
        latency, remark = latency_chart(f"latency-{index}", models)
        ratio = ratio_chart(f"ratio-{index}", models, thresholds.get("latency ratio"))
    return Machine(
        report,
        report.target or "this machine",
        _status(report),
        latency,
        remark,
        ratio,
        answers_of(f"answers-{index}", report, {model.name: model.label for model in models}),
    )


def _status(report: Report) -> Status:
    """Returns the status of a report as a whole: the worst of its checks that have a threshold."""
    if report.exit_code == ExitCode.PASSED:
        return "passed"
    statuses = {check.status for check in report.checks}
    worst: tuple[Status, ...] = ("failed", "undecided")
    return next((status for status in worst if status in statuses), "no data")


def _verdict(machines: Sequence[Machine]) -> str:
    """Returns one sentence about all machines."""
    if len(machines) == 1:
        return capitalized(machines[0].report.verdict)
    return "; ".join(f"{machine.place}: {machine.report.verdict}" for machine in machines)


def _count_checks(reports: Sequence[Report]) -> str:
    """Returns how many checks there were of each status."""
    statuses: list[str] = [check.status for report in reports for check in report.checks]
    words = {status: status for status in MARKS} | {"no data": "without data", "info": "for information"}
    counts = [(statuses.count(status), word) for status, word in words.items()]
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def _worst(statuses: Sequence[str]) -> str:
    return next(status for status in ("failed", "undecided", "no data", "passed") if status in statuses)


def _threshold_words(check: Check) -> str:
    """Returns the threshold with its side: an accuracy has a floor, all else has a ceiling."""
    _, threshold = check_values(check)
    if check.threshold is None:
        return threshold
    return f"{'≥' if check.name == 'accuracy' else '≤'}{SPACE}{threshold}"


def _tradeoff(inputs: PageInputs) -> str:
    if not has_tradeoff(inputs.figures):
        return ""
    limits = Limits.of(inputs.reports[0], inputs.figures)
    return tradeoff_chart("tradeoff", inputs.figures, limits)


def _describe_stage(stage: Stage) -> str:
    seconds = sum(epoch.seconds for epoch in stage.epochs)
    last = stage.epochs[-1]
    return (
        f"{stage.label}: {len(stage.epochs)} epochs in {seconds:,.0f}{SPACE}s, "
        f"{percent(last.val_accuracy)} at the end"
    )


def _describe_layers(layers: Sequence[LayerPlan]) -> str:
    """Returns how much of all layers is left."""
    dense = sum(layer.dense_parameters for layer in layers)
    factored = sum(layer.rank is not None for layer in layers)
    share = sum(layer.parameters for layer in layers) / dense if dense else 1.0
    left = f"{percent(share, 1)} of the dense parameters of all"
    return f"{factored} of {len(layers)} layers are factored, with {left}"


def _kept_dense(layers: Sequence[LayerPlan]) -> Iterator[tuple[str, str]]:
    """Yields the reasons for which layers stay dense, and the names of those layers."""
    kept = sorted((layer for layer in layers if layer.rank is None), key=lambda layer: layer.reason)
    for reason, members in groupby(kept, key=lambda layer: layer.reason):
        yield reason.removeprefix("dense: "), ", ".join(layer.name for layer in members)
