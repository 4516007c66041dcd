"""What was checked and measured, as JSON documents. What people look at are views of them (`views.py`)."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from wasi_export.errors import ExitCode
from wasi_export.settings import Frozen

Status = Literal["passed", "failed", "undecided", "no data", "info"]
Evidence = Literal["device", "emulated", "estimate"]


class Check(Frozen):
    """One thing looked at.

    `info` has no threshold. `no data` has one, but nothing was measured; `undecided` has one that lies within
    the uncertainty of what was measured. Neither is a pass.
    """

    name: str
    status: Status
    value: float | None = None
    """What was measured; None where nothing was, or where the result is not finite."""
    threshold: float | None = None
    unit: str = ""
    """Empty for a count or a ratio."""
    interval: tuple[float, float] | None = Field(
        None, description="confidence interval of the value; None: there is none"
    )
    confidence: float | None = Field(None, description="of the interval, as 0.95")
    p_value: float | None = Field(
        None, description="of the drop of an accuracy: that chance alone makes such a difference"
    )
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
    """Quartiles of the same ratios: how much single rounds differ, not how well the median is known."""
    ratio_interval: tuple[float, float] | None = Field(
        None, description="95 % confidence interval of that median; None: too few rounds"
    )
    noise_floor: float | None = Field(
        None,
        description="by how much the ratio of the first model to itself, loaded twice, may be off 1 in this "
        "run; None: too few rounds, or one model alone",
    )
    load_ms: float
    peak_rss_mb: float
    """Peak resident memory of a fresh process that loads the model and runs one batch, in 10^6 bytes."""
    clock: Literal["cpu", "wall"]
    samples_ms: tuple[float, ...]


class Confusion(Frozen):
    """Images of one class that were taken for another one. Classes are indices."""

    label: int
    answer: int
    images: int


class Predictions(Frozen):
    """What one model answers to the labelled images."""

    model: str = Field(description="as in `latency`: baseline, bundle, …")
    correct: int
    total: int
    matrix: tuple[tuple[int, ...], ...] | None = Field(
        description="images by label (row) and answer (column), [classes, classes]; None: over 50 classes"
    )
    confusions: tuple[Confusion, ...] = Field(description="the 50 most frequent, most frequent first")


class ChangedImage(Frozen):
    """An image to which baseline and bundle give different answers. Classes are indices."""

    image: str = Field(description="path below the folder of images, or #index in a set that is one file")
    label: int
    baseline: int
    bundle: int
    thumbnail: str = Field(
        "",
        pattern=r"^(data:image/jpeg;base64,[A-Za-z0-9+/=]+)?$",
        description="the image in at most 48 pixels; of the first 40 images alone",
    )


class Comparison(Frozen):
    """The answers of the bundle beside those of the baseline, image by image."""

    both_right: int
    lost: int = Field(description="images that the baseline alone gets right")
    won: int = Field(description="images that the bundle alone gets right")
    both_wrong: int
    drop: float = Field(description="(lost - won) / images: top-1 of the baseline minus that of the bundle")
    interval: tuple[float, float] = Field(description="confidence interval of the drop")
    confidence: float
    p_value: float = Field(description="McNemar's exact test of lost and won, two-sided")
    changed: int = Field(description="images whose answer differs, wrong ones that stay wrong among them")
    images: tuple[ChangedImage, ...] = Field(
        description="of those the first 200: lost before won before both wrong"
    )


class LayerTime(Frozen):
    """Time of one Linear layer inside both models, for one image; None: the model has no such layer."""

    layer: str = Field(description="its name, as blocks.0.mlp.fc1; empty: all that is no such layer")
    baseline_ms: float | None
    bundle_ms: float | None


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
    estimate_ms: tuple[float, float] | None = Field(
        description="range of the time on one core of the board; None: a board that we know too little of"
    )
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
    classes: tuple[str, ...] = Field((), description="by index; empty where there were no labelled images")
    predictions: tuple[Predictions, ...] = Field((), description="of each model on the labelled images")
    comparison: Comparison | None = Field(None, description="None: no baseline, or no labelled images")
    layers: tuple[LayerTime, ...] = Field((), description="in the order in which they run")
    instructions: tuple[Instructions, ...] = ()
    host: Host
    board: BoardRun | None = None

    @property
    def exit_code(self) -> ExitCode:
        """0 where every threshold is met, 1 where one is missed, 5 where one had no data or is undecided."""
        statuses = {check.status for check in self.checks}
        if "failed" in statuses:
            return ExitCode.CHECK_FAILED
        if statuses & {"no data", "undecided"} or "passed" not in statuses:
            return ExitCode.NOTHING_TO_CHECK
        return ExitCode.PASSED

    @property
    def verdict(self) -> str:
        """One sentence: passed, or which checks did not and what became of them."""
        if self.exit_code == ExitCode.PASSED:
            return "passed"
        words: Mapping[Status, str] = {
            "failed": "failed", "undecided": "undecided", "no data": "nothing to check for",
        }  # fmt: skip
        parts = []
        for status, word in words.items():
            if names := [check.name for check in self.checks if check.status == status]:
                parts.append(f"{word}: {', '.join(names)}")
        return "; ".join(parts) or "nothing was checked"
