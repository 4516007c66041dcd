"""The jobs of a sweep in one table: a row for each setting, its seeds as mean ± standard deviation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal, Self

from pydantic import Field

from wasi_export.cli._console import note, one_line
from wasi_export.cli._summary import RunSummary, read_document
from wasi_export.cli._sweep import Job
from wasi_export.durable import locked_folder, write_bytes
from wasi_export.errors import WasiExportError
from wasi_export.run_folder import FACTS, RunFacts
from wasi_export.settings import Frozen
from wasi_export.views import markdown_table

SEED = "seed"
TABLE, TABLE_MARKDOWN = "sweep.json", "sweep.md"
FIGURES = (
    "dense accuracy", "accuracy", "parameters", "latency ratio", "training MB", "training s",
)  # fmt: skip


class JobResult(Frozen):
    """What came out of one job."""

    name: str
    settings: Mapping[str, str] = Field(description="keys and values, as TOML")
    summary: RunSummary
    seconds: float | None = Field(description="wall time of the low-rank training steps; None: no epochs")


class Spread(Frozen):
    """A figure over seeds."""

    mean: float
    std: float | None = Field(description="of the sample; None for a single one")

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Returns mean and standard deviation of one value or more."""
        return cls(mean=fmean(values), std=stdev(values) if len(values) > 1 else None)

    def text(self, form: str) -> str:
        """Returns it for people, numbers in this form."""
        return format(self.mean, form) + ("" if self.std is None else f" ± {self.std:{form}}")


class SweepRow(Frozen):
    """The jobs that differ in nothing but the seed."""

    settings: Mapping[str, str]
    runs: int
    passed: int = Field(description="runs that met their thresholds")
    dense_accuracy: Spread
    accuracy: Spread
    parameters: Spread
    latency_ratio: Spread
    step_memory_mb: Spread | None = Field(description="None where it was not measured in every run")
    seconds: Spread | None

    @classmethod
    def of(cls, settings: Mapping[str, str], jobs: Sequence[JobResult]) -> Self:
        """Returns the row of one job or more."""
        low_rank = [job.summary.low_rank for job in jobs]
        return cls(
            settings=settings,
            runs=len(jobs),
            passed=sum(job.summary.exit_code == 0 for job in jobs),
            dense_accuracy=Spread.of([job.summary.dense.accuracy for job in jobs]),
            accuracy=Spread.of([model.accuracy for model in low_rank]),
            parameters=Spread.of([model.parameters for model in low_rank]),
            latency_ratio=Spread.of([model.latency_ratio for model in low_rank]),
            step_memory_mb=_spread(model.step_memory_mb for model in low_rank),
            seconds=_spread(job.seconds for job in jobs),
        )

    def cells(self, settings: Iterable[str]) -> tuple[str, ...]:
        """Returns what stands under these settings, `runs`, FIGURES and `passed`."""
        return (
            *(self.settings.get(key, "") for key in settings),
            str(self.runs),
            self.dense_accuracy.text(".4f"),
            self.accuracy.text(".4f"),
            self.parameters.text(",.0f"),
            self.latency_ratio.text(".3f"),
            "–" if self.step_memory_mb is None else self.step_memory_mb.text(".0f"),
            "–" if self.seconds is None else self.seconds.text(".0f"),
            f"{self.passed}/{self.runs}",
        )


class SweepTable(Frozen):
    """All jobs of a sweep, those that are finished with their figures."""

    schema_version: Literal[1] = 1
    rows: tuple[SweepRow, ...]
    jobs: tuple[JobResult, ...]
    unfinished: tuple[str, ...]

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
        """Returns the columns, the cells of each row, and l or r for each column."""
        settings = tuple(dict.fromkeys(key for row in self.rows for key in row.settings))
        columns = (*settings, "runs", *FIGURES, "passed")
        align = "l" * len(settings) + "r" * (len(columns) - len(settings))
        return columns, [row.cells(settings) for row in self.rows], align

    @property
    def title(self) -> str:
        """How much of the sweep is finished."""
        return f"{len(self.jobs)} of {len(self.jobs) + len(self.unfinished)} jobs are finished"

    def to_markdown(self) -> str:
        """Returns the table as GitHub-flavoured Markdown."""
        columns, rows, align = self.cells()
        return f"{self.title}.\n\n{markdown_table(columns, align, rows)}\n"


def merge(jobs: Sequence[Job], folder: Path, finished: Callable[[Job], RunSummary | None]) -> SweepTable:
    """Writes the table of a sweep into its folder, as JSON and as Markdown, and returns it.

    Under a lock, so that of several parts that end together the last one writes what all have done. A job
    whose results cannot be read is not finished, and a line says why.
    """
    with locked_folder(folder, wait=True):
        results = []
        for job in jobs:
            try:
                if (summary := finished(job)) is not None:
                    results.append(_result(job, folder, summary))
            except WasiExportError as error:
                note(f"not in the table: {job.name}: {one_line(error)}")
        done = {result.name for result in results}
        table = SweepTable(
            rows=tuple(_rows(results)),
            jobs=tuple(results),
            unfinished=tuple(job.name for job in jobs if job.name not in done),
        )
        write_bytes(folder / TABLE, (table.model_dump_json(indent=2) + "\n").encode())
        write_bytes(folder / TABLE_MARKDOWN, table.to_markdown().encode())
    return table


def _result(job: Job, folder: Path, summary: RunSummary) -> JobResult:
    """Returns what came out of a finished job.

    Raises:
        IntegrityError: its low-rank run is gone, or not what was written.
    """
    trained = read_document(RunFacts, folder / job.name / "subspace" / FACTS)
    return JobResult(
        name=job.name,
        settings=dict(job.settings),
        summary=summary,
        seconds=trained.metrics.get("seconds"),
    )


def _rows(results: Iterable[JobResult]) -> list[SweepRow]:
    """Returns a row for each setting, in the order of the jobs."""
    groups: dict[tuple[tuple[str, str], ...], list[JobResult]] = {}
    for result in results:
        settings = tuple((key, value) for key, value in result.settings.items() if key != SEED)
        groups.setdefault(settings, []).append(result)
    return [SweepRow.of(dict(settings), jobs) for settings, jobs in groups.items()]


def _spread(values: Iterable[float | None]) -> Spread | None:
    """Returns the spread; None where a value is missing."""
    known = list(values)
    present = [value for value in known if value is not None]
    return Spread.of(present) if len(present) == len(known) else None
