"""Views of a report: Markdown, and the rows and sentences that the tables of commands share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from wasi_export.errors import ExitCode
from wasi_export.report import BoardRun, Check, Comparison, Instructions, Latency, Report, Status

COUNTED = (
    "Of one run on one thread, counted by an emulator. A count is no time; the estimate is a range "
    "for one core of a Raspberry Pi 5, from how many instructions it can begin in a cycle."
)
MARKS: Mapping[Status, str] = {
    "passed": "✅", "failed": "❌", "undecided": "⚠️", "no data": "⚠️", "info": "ℹ️",
}  # fmt: skip
CHANGED_IN_MARKDOWN = 10


def to_markdown(report: Report) -> str:
    """Returns the report as GitHub-flavoured Markdown: verdict, checks, latency, host."""
    mark = {ExitCode.PASSED: "✅", ExitCode.CHECK_FAILED: "❌"}.get(report.exit_code, "⚠️")
    blocks = [
        f"# {mark} {cell(report.model)}: {cell(report.verdict)}",
        f"Bundle `{cell(report.bundle)}`, model.onnx sha256 `{cell(report.model_sha256[:12])}…`.",
        "## Checks",
        markdown_table(
            ("check", "status", "value", "threshold", "evidence", "detail"),
            "lcrrll",
            map(_check_row, report.checks),
        ),
    ]
    if report.latency:
        blocks += ["## Latency", markdown_table(*LATENCY_COLUMNS, map(latency_row, report.latency))]
        blocks.append(describe_measurement(report.latency[0]))
    if report.comparison:
        blocks += ["## Answers", *_describe_answers(report.comparison, report.classes)]
    if report.instructions:
        rows = map(instruction_row, report.instructions)
        blocks += ["## Instructions", markdown_table(*INSTRUCTION_COLUMNS, rows), COUNTED]
    if report.board:
        blocks.append(capitalized(cell(describe_board(report.board))) + ".")
    host = report.host
    facts = (
        ("target", report.target or "this machine"),
        ("machine", host.machine),
        ("processor", f"{host.processor}, {host.cores} cores"),
        ("memory", f"{host.memory_mb} MB"),
        ("system", host.system),
        ("versions", ", ".join(f"{name} {version}" for name, version in host.versions.items())),
        ("evidence", host.evidence),
    )
    blocks += ["## Host", markdown_table(("", ""), "ll", facts)]
    return "\n\n".join(blocks) + "\n"


Columns = tuple[tuple[str, ...], str]
"""Names of columns, and l, c or r for each."""
LATENCY_COLUMNS: Columns = (
    ("model", "p50 ms", "p90 ms", "p99 ms", "ratio", "95 % interval", "quartiles", "load ms", "peak RSS MB"),
    "lrrrrrrrr",
)


def latency_row(latency: Latency) -> tuple[str, ...]:
    """Returns the cells of one model under `LATENCY_COLUMNS`."""
    times = (f"{ms:.2f}" for ms in (latency.p50_ms, latency.p90_ms, latency.p99_ms))
    ratios = (
        f"{latency.ratio_to_first:.3f}",
        "–" if latency.ratio_interval is None else "{:.3f}–{:.3f}".format(*latency.ratio_interval),
        f"{latency.ratio_low:.3f}–{latency.ratio_high:.3f}",
    )
    return latency.model, *times, *ratios, f"{latency.load_ms:.0f}", f"{latency.peak_rss_mb:.0f}"


def check_values(check: Check) -> tuple[str, str]:
    """Returns the value and the threshold of a check as a person reads them; `–` where there is none."""
    value, threshold = (
        "–" if number is None else f"{number:.4g} {check.unit}".strip()
        for number in (check.value, check.threshold)
    )
    return value, threshold


INSTRUCTION_COLUMNS: Columns = (
    ("model", "instructions", "ratio", "SIMD", "FMLA", "dot product", "load, store", "one core"),
    "lrrrrrrr",
)


def instruction_row(count: Instructions) -> tuple[str, ...]:
    """Returns the cells of counted instructions, in millions, and the estimate with its name."""
    kinds = (count.simd, count.fmla, count.dot, count.load_store)
    estimate = "–"
    if count.estimate_ms is not None:
        low, high = count.estimate_ms
        estimate = f"{count.estimate_evidence}: {low:.3g}–{high:.3g} ms"
    return (
        count.model,
        f"{count.total / 1e6:.1f} M",
        f"{count.ratio_to_first:.3f}",
        *(f"{kind / 1e6:.1f} M" for kind in kinds),
        estimate,
    )


def describe_board(board: BoardRun) -> str:
    """Returns in words how a board was while a program ran on it."""
    samples = board.samples
    hottest = max((s.celsius for s in samples if s.celsius is not None), default=None)
    clocks = [s.clock_mhz for s in board.during if s.clock_mhz is not None]
    parts = [
        f"governor {board.governor}" if board.governor else "",
        f"clock {min(clocks):.0f} to {max(clocks):.0f} MHz" if clocks else "",
        f"at most {hottest:.0f} °C" if hottest is not None else "",
        "" if board.joules is None else f"estimate: {board.joules:.1f} J above idle over the rails that tell",
        f"not valid for latency: {', '.join(board.problems)}" if board.problems else "",
    ]
    told = [part for part in parts if part]
    return f"board, {board.seconds:.0f} s, {len(samples)} samples: {', '.join(told) or 'it tells nothing'}"


def _check_row(check: Check) -> tuple[str, ...]:
    mark = f"{MARKS[check.status]} {check.status}"
    return check.name, mark, *check_values(check), check.evidence, check.detail


def describe_measurement(first: Latency) -> str:
    """Returns in words how a latency table was measured."""
    clock = "CPU time of the process" if first.clock == "cpu" else "wall clock"
    noise = ""
    if first.noise_floor is not None:
        noise = f"; the first model against itself is within {first.noise_floor:.1%}, the noise floor"
    return (
        f"Batch {first.batch}, threads {first.threads}, {len(first.samples_ms)} rounds after warm-up with "
        f"the models in turns, {clock}. The ratio to the first is the median over rounds, with its interval; "
        f"quartiles are of single rounds{noise}. Load time and peak memory are of a fresh process."
    )


def _describe_answers(comparison: Comparison, classes: Sequence[str]) -> Iterator[str]:
    """Yields the two by two table of a comparison, and the first images whose answer changed."""
    yield markdown_table(
        ("images", "bundle right", "bundle wrong"),
        "lrr",
        (
            ("baseline right", str(comparison.both_right), str(comparison.lost)),
            ("baseline wrong", str(comparison.won), str(comparison.both_wrong)),
        ),
    )
    if comparison.images:
        shown = comparison.images[:CHANGED_IN_MARKDOWN]
        yield f"{comparison.changed} images have another answer than of the baseline; {len(shown)} of them:"
        rows = ((c.image, *(class_name(i, classes) for i in (c.label, c.baseline, c.bundle))) for c in shown)
        yield markdown_table(("image", "label", "baseline", "bundle"), "llll", rows)


def class_name(index: int, classes: Sequence[str]) -> str:
    """Returns the name of a class; an answer that is none has `–`."""
    return classes[index] if 0 <= index < len(classes) else "–"


def markdown_table(columns: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; `align` has l, c or r for each column."""
    rule = ({"l": ":--", "c": ":-:", "r": "--:"}[letter] for letter in align)
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in (columns, tuple(rule), *rows))


def cell(text: str) -> str:
    """Returns text on one line that cannot end a cell of a table or begin an HTML tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def capitalized(text: str) -> str:
    """Returns text that begins with a capital; `str.capitalize` makes the rest small, MHz and °C with it."""
    return text[:1].upper() + text[1:]
