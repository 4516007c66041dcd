"""What was checked and measured, as one JSON document; Markdown is a view of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field

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
    evidence: Evidence = "device"


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


class Instructions(Frozen):
    """Instructions of one run of a model, counted by an emulator: no time, but the same on every machine."""

    model: str
    batch: int
    total: int
    simd: int = Field(description="on vector registers, all kinds")
    fmla: int = Field(description="fused multiply-adds of floats, on vectors; of the SIMD ones")
    dot: int = Field(description="dot products of int8; of the SIMD ones")
    load_store: int
    branch: int
    ratio_to_first: float = Field(description="of the totals")
    estimate_ms: tuple[float, float] = Field(description="range of the time on a Raspberry Pi 5, one thread")
    evidence: Evidence = "emulated"
    estimate_evidence: Evidence = "estimate"


class BoardSample(Frozen):
    """What a board told of itself at one moment; None: it does not tell."""

    seconds: float = Field(description="since the program started; below 0 before it")
    throttled: int | None = Field(description="bits of `vcgencmd get_throttled`")
    celsius: float | None
    clock_mhz: float | None
    available_mb: int | None
    watts: float | None = Field(description="over the rails that the power chip of a Raspberry Pi 5 measures")


class BoardRun(Frozen):
    """A board while a program ran on it alone, about once a second."""

    governor: str | None
    max_clock_mhz: float | None
    seconds: float
    samples: tuple[BoardSample, ...]

    @property
    def during(self) -> tuple[BoardSample, ...]:
        """The samples of the time in which the program ran."""
        return tuple(sample for sample in self.samples if 0 <= sample.seconds <= self.seconds)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why a latency of this run says nothing of the board; empty: nothing is known against it."""
        now = 0
        for sample in self.during:
            now |= (sample.throttled or 0) & 0xF
        problems = [name for bit, name in enumerate(THROTTLING) if now >> bit & 1]
        clocks = [sample.clock_mhz for sample in self.during if sample.clock_mhz is not None]
        if clocks and self.max_clock_mhz and max(clocks) < CLOCK_SHARE * self.max_clock_mhz:
            problems.append(f"the clock was {max(clocks):.0f} of {self.max_clock_mhz:.0f} MHz at most")
        return tuple(problems)

    @property
    def joules(self) -> float | None:
        """Energy above idle, of the rails that are measured; None where they are not."""
        idle = [s.watts for s in self.samples if s.seconds < 0 and s.watts is not None]
        busy = [s.watts for s in self.during if s.watts is not None]
        if not idle or not busy:
            return None
        return (sum(busy) / len(busy) - sum(idle) / len(idle)) * self.seconds


THROTTLING = ("under-voltage", "a capped frequency", "throttling", "the soft temperature limit")
"""Bits 0 to 3 of `vcgencmd get_throttled`: now; 16 to 19: since it was started."""
CLOCK_SHARE = 0.95


class Benchmark(Frozen):
    """The result of `wasi-export bench`: the models in the order given, and where they ran."""

    schema_version: Literal[1] = 1
    latency: tuple[Latency, ...] = ()
    instructions: tuple[Instructions, ...] = ()
    host: Host
    board: BoardRun | None = None


class Report(Frozen):
    """The result of a validation: verdict first, then what it rests on."""

    schema_version: Literal[1] = 1
    target: str = Field("", description="where it was checked; empty: where the command ran")
    bundle: str
    model: str
    model_sha256: str
    checks: tuple[Check, ...]
    latency: tuple[Latency, ...] = ()
    instructions: tuple[Instructions, ...] = ()
    host: Host
    board: BoardRun | None = None

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


COUNTED = (
    "Of one run on one thread, counted by an emulator. A count is no time; the estimate is a range "
    "for one core of a Raspberry Pi 5, from how many instructions it can begin in a cycle."
)
MARKS: Mapping[Status, str] = {"passed": "✅", "failed": "❌", "no data": "⚠️", "info": "ℹ️"}


def to_markdown(report: Report) -> str:
    """Returns the report as GitHub-flavoured Markdown: verdict, checks, latency, host."""
    mark = {ExitCode.PASSED: "✅", ExitCode.CHECK_FAILED: "❌"}.get(report.exit_code, "⚠️")
    blocks = [
        f"# {mark} {_cell(report.model)}: {report.verdict}",
        f"Bundle `{report.bundle}`, model.onnx sha256 `{report.model_sha256[:12]}…`.",
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
    if report.instructions:
        rows = map(instruction_row, report.instructions)
        blocks += ["## Instructions", markdown_table(*INSTRUCTION_COLUMNS, rows), COUNTED]
    if report.board:
        blocks.append(describe_board(report.board).capitalize() + ".")
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


INSTRUCTION_COLUMNS = (
    ("model", "instructions", "ratio", "SIMD", "FMLA", "dot product", "load, store", "Pi 5, one thread"),
    "lrrrrrrr",
)


def instruction_row(count: Instructions) -> tuple[str, ...]:
    """Returns the cells of counted instructions, in millions, and the estimate with its name."""
    kinds = (count.simd, count.fmla, count.dot, count.load_store)
    low, high = count.estimate_ms
    return (
        count.model,
        f"{count.total / 1e6:.1f} M",
        f"{count.ratio_to_first:.3f}",
        *(f"{kind / 1e6:.1f} M" for kind in kinds),
        f"{count.estimate_evidence}: {low:.3g}–{high:.3g} ms",
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
