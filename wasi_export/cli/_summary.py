"""What `wasi-export run` ends with: dense against low-rank in one table."""

from pathlib import Path
from typing import Self, TypeVar

from pydantic import ValidationError

from wasi_export.artifact import Bundle
from wasi_export.config import Frozen
from wasi_export.errors import IntegrityError
from wasi_export.report import Report

D = TypeVar("D", bound=Frozen)

COLUMNS = ("", "accuracy", "parameters", "model.onnx MB", "latency ms", "ratio", "training MB")


class ModelSummary(Frozen):
    """One row: measured in onnxruntime, but for the memory, which is of a torch training step."""

    model: str
    accuracy: float
    parameters: int
    size_mb: float
    """model.onnx, in 10^6 bytes."""
    latency_ms: float
    """p50 at batch 1."""
    latency_ratio: float
    """Median over rounds of this model's time over the dense one's."""
    step_memory_mb: float | None
    """Peak of a training step over what the process has before it; None where it cannot be measured."""

    def cells(self) -> tuple[str, ...]:
        """Returns the row under `COLUMNS`."""
        return (
            self.model,
            f"{self.accuracy:.4f}",
            f"{self.parameters:,}",
            f"{self.size_mb:.2f}",
            f"{self.latency_ms:.2f}",
            f"{self.latency_ratio:.3f}",
            "–" if self.step_memory_mb is None else f"{self.step_memory_mb:.0f}",
        )


class StepMemoryPair(Frozen):
    """Peak memory of a training step, in 10^6 bytes; None where it cannot be measured."""

    dense_mb: float | None = None
    low_rank_mb: float | None = None


class RunSummary(Frozen):
    """The result of the pipeline."""

    name: str
    verdict: str
    exit_code: int
    dense: ModelSummary
    low_rank: ModelSummary
    bundle: Path
    report: Path

    @classmethod
    def of(
        cls,
        report: Report,
        baseline: Bundle,
        bundle: Bundle,
        *,
        memory: StepMemoryPair,
        report_path: Path,
    ) -> Self:
        """Returns the summary of a report on both bundles and real images."""
        values = {check.name: check.value for check in report.checks}
        accuracy, drop = values["accuracy"], values["accuracy drop"]
        assert accuracy is not None
        assert drop is not None
        first, second = report.latency
        return cls(
            name=report.model,
            verdict=report.verdict,
            exit_code=int(report.exit_code),
            dense=ModelSummary(
                model="dense",
                accuracy=accuracy + drop,
                parameters=baseline.manifest.model.parameters,
                size_mb=baseline.model_path.stat().st_size / 1e6,
                latency_ms=first.p50_ms,
                latency_ratio=first.ratio_to_first,
                step_memory_mb=memory.dense_mb,
            ),
            low_rank=ModelSummary(
                model="low-rank",
                accuracy=accuracy,
                parameters=bundle.manifest.model.parameters,
                size_mb=bundle.model_path.stat().st_size / 1e6,
                latency_ms=second.p50_ms,
                latency_ratio=second.ratio_to_first,
                step_memory_mb=memory.low_rank_mb,
            ),
            bundle=bundle.path,
            report=report_path,
        )


def read_document(model: type[D], path: Path) -> D:
    """Returns what a finished stage wrote.

    Raises:
        IntegrityError: the file is not what was written.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = " ".join(str(error).splitlines()[:3])
        raise IntegrityError(f"{path} is not what a run wrote: {first}: run with --force") from error
