"""What a page is made of: reports first, and what a run knows beside them."""

from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from wasi_export.ranks import LayerPlan
from wasi_export.report import Latency, Report
from wasi_export.settings import Frozen
from wasi_export.step_memory import StepCurve

DENSE, OWN = "baseline", "bundle"
"""Names that a report has for the dense twin and for what was checked; a graph of them in smaller numbers is
`bundle, int8`."""
Series = Literal["dense", "own", "other"]


class Epoch(BaseModel):
    """What is shown of a line of metrics.jsonl, whose own model needs torch."""

    model_config = ConfigDict(frozen=True)

    train_loss: float | None
    val_loss: float | None
    """None where it was not finite."""
    val_accuracy: float
    seconds: float


class Stage(Frozen):
    """The training of one model; a stage begins with what the one before it ended with."""

    label: str
    series: Series
    epochs: tuple[Epoch, ...]


class TrainingStep(Frozen):
    """The memory of a training step of one model."""

    label: str
    series: Series
    curve: StepCurve


class ModelFigures(Frozen):
    """What was measured of one graph; None: it was not."""

    name: str = Field(description="in the report")
    label: str = Field(description="on the page")
    accuracy: float | None = None
    parameters: int | None = None
    size_mb: float | None = None
    latency: Latency | None = None
    step_memory_mb: float | None = None

    @property
    def series(self) -> Series:
        """Which colour it has."""
        owner = self.name.partition(",")[0]
        return "dense" if owner == DENSE else "own" if owner == OWN else "other"

    @property
    def is_quantized(self) -> bool:
        """Whether it is a graph of another one in smaller numbers; such a graph is drawn hollow."""
        return "," in self.name

    @property
    def css(self) -> str:
        """The classes of its marks."""
        return f"s-{self.series}" + (" hollow" if self.is_quantized else "")

    @property
    def quartiles_ms(self) -> tuple[float, float] | None:
        """First and third quartile of the samples."""
        if self.latency is None or len(self.latency.samples_ms) < 2:
            return None
        low, _, high = quantiles(self.latency.samples_ms, n=4, method="inclusive")
        return low, high


class PageInputs(Frozen):
    """All that one page shows."""

    reports: Sequence[Report] = Field(min_length=1, description="of this machine first, then of others")
    figures: Sequence[ModelFigures] = Field(description="of the first report, the dense model first")
    facts: Mapping[str, str] = Field({}, description="of the model, by what they are called")
    layers: Sequence[LayerPlan] = ()
    stages: Sequence[Stage] = ()
    steps: Sequence[TrainingStep] = ()
    step_batch: int | None = Field(None, description="batch of the training step whose memory was measured")
    is_run: bool = Field(False, description="whether all of it is of one `wasi-export run`")


def figures_of(report: Report) -> tuple[ModelFigures, ...]:
    """Returns what a report says of each graph, in its order; of the bundle alone where no time was taken."""
    values = {check.name: check.value for check in report.checks}
    latency = {found.model: found for found in report.latency}
    own, drop = values.get("accuracy"), values.get("accuracy drop")
    accuracies = {OWN: own, DENSE: None if own is None or drop is None else own + drop}
    names = list(latency) or [OWN]
    return tuple(
        ModelFigures(
            name=name,
            label=name,
            accuracy=accuracies.get(name, values.get(f"accuracy of {name}")),
            size_mb=values.get("size") if name == OWN else None,
            latency=latency.get(name),
        )
        for name in names
    )
