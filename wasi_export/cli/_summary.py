"""What `wasi-export run` ends with: dense and low-rank, fp32 and int8, in one table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self, TypeVar

from wasi_export.artifact import Bundle
from wasi_export.errors import IntegrityError, MalformedError
from wasi_export.report import Report
from wasi_export.runtimes.checks import accuracy_name
from wasi_export.settings import Frozen
from wasi_export.step_memory import StepCurve
from wasi_export.untrusted import document

D = TypeVar("D", bound=Frozen)

PAGE, MEMORY = "report.html", "memory.json"
"""Beside the report of a run."""

COLUMNS = ("", "accuracy", "parameters", "ONNX MB", "latency ms", "ratio", "training MB")


class ModelSummary(Frozen):
    """One row: measured in onnxruntime, but for the memory, which is of a torch training step."""

    model: str
    accuracy: float
    parameters: int
    size_mb: float
    """Of the ONNX file, in 10^6 bytes."""
    latency_ms: float
    """p50 at batch 1."""
    latency_ratio: float
    """Median over rounds of this model's time over the dense one's."""
    step_memory_mb: float | None = None
    """Peak of a training step over what the process has before it; None where it cannot be measured, and of
    int8, which is not trained."""

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
    """Memory of a training step, dense and low-rank: its peak in 10^6 bytes where it can be measured."""

    dense_mb: float | None = None
    low_rank_mb: float | None = None
    dense_curve: StepCurve | None = None
    low_rank_curve: StepCurve | None = None


class RunSummary(Frozen):
    """The result of the pipeline."""

    schema_version: Literal[1] = 1
    name: str
    verdict: str
    exit_code: int
    dense: ModelSummary
    low_rank: ModelSummary
    dense_int8: ModelSummary
    low_rank_int8: ModelSummary
    bundle: Path
    report: Path
    page: Path | None = None
    """None: it needs an extra that is not installed."""

    @classmethod
    def of(
        cls,
        report: Report,
        baseline: Bundle,
        bundle: Bundle,
        *,
        int8: Mapping[str, Path],
        memory: StepMemoryPair,
        report_path: Path,
    ) -> Self:
        """Returns the summary of a report with real images, on both bundles and, by name, int8 graphs."""
        values = {check.name: check.value for check in report.checks}
        latency = {found.model: found for found in report.latency}
        accuracy, drop = values["accuracy"], values["accuracy drop"]
        assert accuracy is not None
        assert drop is not None

        def row(model: str, name: str, owner: Bundle, path: Path, accuracy: float | None) -> ModelSummary:
            assert accuracy is not None
            return ModelSummary(
                model=model,
                accuracy=accuracy,
                parameters=owner.manifest.model.parameters,
                size_mb=path.stat().st_size / 1e6,
                latency_ms=latency[name].p50_ms,
                latency_ratio=latency[name].ratio_to_first,
            )

        def int8_row(model: str, name: str, owner: Bundle) -> ModelSummary:
            return row(model, name, owner, int8[name], values[accuracy_name(name)])

        dense = row("dense", "baseline", baseline, baseline.model_path, accuracy + drop)
        low_rank = row("low-rank", "bundle", bundle, bundle.model_path, accuracy)
        return cls(
            name=report.model,
            verdict=report.verdict,
            exit_code=int(report.exit_code),
            dense=dense.model_copy(update={"step_memory_mb": memory.dense_mb}),
            low_rank=low_rank.model_copy(update={"step_memory_mb": memory.low_rank_mb}),
            dense_int8=int8_row("dense, int8", "baseline, int8", baseline),
            low_rank_int8=int8_row("low-rank, int8", "bundle, int8", bundle),
            bundle=bundle.path,
            report=report_path,
        )

    def cells(self) -> tuple[tuple[str, ...], ...]:
        """Returns the rows of the table under `COLUMNS`."""
        rows = (self.dense, self.low_rank, self.dense_int8, self.low_rank_int8)
        return tuple(row.cells() for row in rows)


def read_document(model: type[D], path: Path) -> D:
    """Returns what a finished stage wrote.

    Raises:
        IntegrityError: the file is not what was written.
    """
    try:
        return document.read_document(path, model)
    except (OSError, MalformedError) as error:
        raise IntegrityError(
            f"{path} is not what a run wrote: {error}: make it anew with `wasi-export run CONFIG --force`"
        ) from error
