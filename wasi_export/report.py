"""What was checked and measured, as one JSON document; Markdown is a view of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from wasi_export.config import Frozen
from wasi_export.errors import ExitCode

Status = Literal["passed", "failed", "no data", "info"]
Evidence = Literal["device", "emulated", "estimate"]


class Check(Frozen):
    """One thing looked at; `info` has no threshold, `no data` has one but nothing was measured."""

    name: str
    status: Status
    value: float | None = None
    """What was measured; None where nothing was, or where the result is not finite."""
    threshold: float | None = None
    unit: str = ""
    """Empty for a count or a ratio."""
    detail: str = ""


class Latency(Frozen):
    """Latency of one model in ms, sessions interleaved, after warm-up; raw samples kept."""

    model: str
    batch: int
    threads: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    ratio_to_first: float
    """Median over rounds of this model's time over the first model's in the same round."""
    ratio_low: float
    ratio_high: float
    """Quartiles of the same ratios."""
    load_ms: float
    peak_rss_mb: float
    """Peak resident memory of a fresh process that loads the model and runs one batch, in 10^6 bytes."""
    clock: Literal["cpu", "wall"]
    samples_ms: tuple[float, ...]


class Host(Frozen):
    """Where the figures were measured."""

    machine: str
    processor: str
    cores: int
    memory_mb: int
    system: str
    versions: Mapping[str, str]
    evidence: Evidence = "device"


class Benchmark(Frozen):
    """The result of `wasi-export bench`: the models in the order given, and where they ran."""

    schema_version: Literal[1] = 1
    latency: tuple[Latency, ...]
    host: Host


class Report(Frozen):
    """The result of a validation: verdict first, then what it rests on."""

    schema_version: Literal[1] = 1
    bundle: str
    model: str
    model_sha256: str
    checks: tuple[Check, ...]
    latency: tuple[Latency, ...] = ()
    host: Host

    @property
    def exit_code(self) -> ExitCode:
        """0 where every threshold is met, 5 where one had no data, 1 where one was missed."""
        statuses = {check.status for check in self.checks}
        if "failed" in statuses:
            return ExitCode.CHECK_FAILED
        if "no data" in statuses or not statuses & {"passed"}:
            return ExitCode.NOTHING_TO_CHECK
        return ExitCode.PASSED

    @property
    def verdict(self) -> str:
        """One sentence: passed, or which checks did not and what became of them."""
        if self.exit_code == ExitCode.PASSED:
            return "passed"
        failed = [check.name for check in self.checks if check.status == "failed"]
        no_data = [check.name for check in self.checks if check.status == "no data"]
        parts = [f"failed: {', '.join(failed)}"] if failed else []
        parts += [f"nothing to check for: {', '.join(no_data)}"] if no_data else []
        return "; ".join(parts) or "nothing was checked"


MARKS: Mapping[Status, str] = {"passed": "✅", "failed": "❌", "no data": "⚠️", "info": "ℹ️"}


def to_markdown(report: Report) -> str:
    """Returns the report as GitHub-flavoured Markdown: verdict, checks, latency, host."""
    mark = {ExitCode.PASSED: "✅", ExitCode.CHECK_FAILED: "❌"}.get(report.exit_code, "⚠️")
    blocks = [
        f"# {mark} {_cell(report.model)}: {report.verdict}",
        f"Bundle `{report.bundle}`, model.onnx sha256 `{report.model_sha256[:12]}…`.",
        "## Checks",
        markdown_table(
            ("check", "status", "value", "threshold", "detail"), "lcrrl", map(_check_row, report.checks)
        ),
    ]
    if report.latency:
        blocks += ["## Latency", markdown_table(*LATENCY_COLUMNS, map(latency_row, report.latency))]
        blocks.append(describe_measurement(report.latency[0]))
    host = report.host
    facts = (
        ("machine", host.machine),
        ("processor", f"{host.processor}, {host.cores} cores"),
        ("memory", f"{host.memory_mb} MB"),
        ("system", host.system),
        ("versions", ", ".join(f"{name} {version}" for name, version in host.versions.items())),
        ("evidence", host.evidence),
    )
    blocks += ["## Host", markdown_table(("", ""), "ll", facts)]
    return "\n\n".join(blocks) + "\n"


LATENCY_COLUMNS = (
    ("model", "p50 ms", "p90 ms", "p99 ms", "ratio to first", "quartiles", "load ms", "peak RSS MB"),
    "lrrrrrrr",
)


def latency_row(latency: Latency) -> tuple[str, ...]:
    """Returns the cells of one model under `LATENCY_COLUMNS`."""
    times = (f"{ms:.2f}" for ms in (latency.p50_ms, latency.p90_ms, latency.p99_ms))
    quartiles = f"{latency.ratio_low:.3f}–{latency.ratio_high:.3f}"
    ratio, load = f"{latency.ratio_to_first:.3f}", f"{latency.load_ms:.0f}"
    return latency.model, *times, ratio, quartiles, load, f"{latency.peak_rss_mb:.0f}"


def check_values(check: Check) -> tuple[str, str]:
    """Returns the value and the threshold of a check as a person reads them; `–` where there is none."""
    value, threshold = (
        "–" if number is None else f"{number:.4g} {check.unit}".strip()
        for number in (check.value, check.threshold)
    )
    return value, threshold


def _check_row(check: Check) -> tuple[str, ...]:
    return check.name, f"{MARKS[check.status]} {check.status}", *check_values(check), check.detail


def describe_measurement(first: Latency) -> str:
    """Returns in words how a latency table was measured."""
    clock = "CPU time of the process" if first.clock == "cpu" else "wall clock"
    return (
        f"Batch {first.batch}, threads {first.threads}, {len(first.samples_ms)} rounds after warm-up with "
        f"the models in turns, {clock}. The ratio is the median over rounds, with its quartiles. Load time "
        "and peak memory are of a fresh process."
    )


def markdown_table(columns: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; `align` has l, c or r for each column."""
    rule = ({"l": ":--", "c": ":-:", "r": "--:"}[letter] for letter in align)
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in (columns, tuple(rule), *rows))


def _cell(text: str) -> str:
    """Returns text that cannot end a cell or a line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
