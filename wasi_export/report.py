"""What was checked and measured, as one JSON document; Markdown is a view of it."""

from collections.abc import Mapping
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
    threshold: float | None = None
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


class Report(Frozen):
    """The result of a validation: verdict first, then what it rests on."""

    schema_version: Literal[1] = 1
    bundle: str
    model: str
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
