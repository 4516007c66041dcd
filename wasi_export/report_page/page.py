"""The page: every part that there is data for, put into the template. The same inputs give the same bytes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from wasi_export._extras import require
from wasi_export.errors import ExitCode
from wasi_export.ranks import LayerPlan
from wasi_export.report import Check, Report
from wasi_export.report_page.comparison import bars_of, columns_of
from wasi_export.report_page.curves import curves_chart
from wasi_export.report_page.gaps import gaps_of
from wasi_export.report_page.inputs import PageInputs, Stage, figures_of
from wasi_export.report_page.latency import latency_chart
from wasi_export.report_page.layers import group_layers, layer_chart
from wasi_export.report_page.quantities import SPACE, percent
from wasi_export.report_page.tiles import tiles_of
from wasi_export.report_page.tradeoff import Limits, has_tradeoff, tradeoff_chart
from wasi_export.views import (
    COUNTED,
    INSTRUCTION_COLUMNS,
    LATENCY_COLUMNS,
    check_values,
    describe_board,
    describe_measurement,
    instruction_row,
    latency_row,
)

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
"""Characters that are no XML, or that turn the direction of the text after them."""
MARKS = {"passed": "✓", "failed": "✕", "no data": "?", "info": "·"}


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


def render_page(inputs: PageInputs) -> bytes:
    """Returns the HTML file.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("wasi_export.report_page", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text: str = environment.get_template("page.html.j2").render(_context(inputs))
    return UNSEEN.sub("\ufffd", text).encode()


def _context(inputs: PageInputs) -> dict[str, Any]:
    """Returns what the template reads."""
    first = inputs.reports[0]
    machines = [_machine(index, report, inputs) for index, report in enumerate(inputs.reports)]
    groups = group_layers(inputs.layers)
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
            (group, layer_chart(f"layers-{index}", group, inputs.layers))
            for index, group in enumerate(groups)
        ],
        "layers": inputs.layers,
        "layers_total": _describe_layers(inputs.layers),
        "kept_dense": list(_kept_dense(inputs.layers)),
        "has_times": any(layer.factored_ms is not None for layer in inputs.layers),
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
    place = report.target or "this machine"
    status = {ExitCode.PASSED: "passed", ExitCode.CHECK_FAILED: "failed"}.get(report.exit_code, "no data")
    if not report.latency:
        return Machine(report, place, status)
    models = inputs.figures if index == 0 else figures_of(report)
    return Machine(report, place, status, *latency_chart(f"latency-{index}", models))


def _verdict(machines: Sequence[Machine]) -> str:
    """Returns one sentence about all machines."""
    if len(machines) == 1:
        verdict = machines[0].report.verdict
        return verdict[:1].upper() + verdict[1:]
    return "; ".join(f"{machine.place}: {machine.report.verdict}" for machine in machines)


def _count_checks(reports: Sequence[Report]) -> str:
    """Returns how many checks there were of each status."""
    statuses: list[str] = [check.status for report in reports for check in report.checks]
    words = {"passed": "passed", "failed": "failed", "no data": "without data", "info": "for information"}
    counts = [(statuses.count(status), word) for status, word in words.items()]
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def _worst(statuses: Sequence[str]) -> str:
    return next(status for status in ("failed", "no data", "passed") if status in statuses)


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
