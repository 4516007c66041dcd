"""What `wasi-export report` reads: the folder of a finished run, or that of a report."""

from collections.abc import Iterator
from pathlib import Path

from wasi_export.cli._summary import MEMORY, RunSummary, StepMemoryPair, read_document
from wasi_export.cli._target import SUMMARY
from wasi_export.config import Config
from wasi_export.errors import MalformedError, UsageError
from wasi_export.manifest import CONFIG, Manifest
from wasi_export.report import Report
from wasi_export.report_page import PageInputs
from wasi_export.report_page.inputs import Epoch, ModelFigures, Series, Stage, TrainingStep, figures_of
from wasi_export.runtimes.validate import read_report
from wasi_export.untrusted.document import MAX_BYTES, parse_document

REPORT = "report.json"


def report_folder_of(path: Path) -> Path:
    """Returns the folder that has the report: the one given, or `report` of a run.

    Raises:
        UsageError: there is no report.
    """
    for folder in (path / "report", path):
        if (folder / SUMMARY).is_file() or _report_files(folder):
            return folder
    raise UsageError(
        f"{path} has no {REPORT}: give the folder of a finished `wasi-export run`, or what `wasi-export "
        "validate --report` wrote"
    )


def read_inputs(path: Path) -> PageInputs:
    """Returns all that is known of a run or of a report.

    Raises:
        UsageError: there is no report, or a file of it is none.
        IntegrityError: the folder of a run does not hold what a run wrote.
    """
    folder = report_folder_of(path)
    reports = tuple(map(read_report, _report_files(folder)))
    if not reports:
        raise UsageError(f"{folder} has no {REPORT}: run `wasi-export run` again")
    run = folder.resolve().parent if folder == path else path  # the parent of `.` is `.`
    if not (folder / SUMMARY).is_file():
        return PageInputs(reports=reports, figures=figures_of(reports[0]), facts=_facts(reports[0]))
    summary = read_document(RunSummary, folder / SUMMARY)
    manifest = read_document(Manifest, run / "bundle" / "manifest.json")
    config = Config.from_toml(run / "bundle" / CONFIG)
    return PageInputs(
        reports=reports,
        figures=_run_figures(reports[0], summary),
        facts=_facts(reports[0], manifest),
        layers=manifest.model.layers,
        stages=tuple(_stages(run)),
        steps=tuple(_steps(read_document(StepMemoryPair, folder / MEMORY))),
        step_batch=config.data.batch_size,
        is_run=True,
    )


def _report_files(folder: Path) -> list[Path]:
    """Returns the report of a folder, and those of the folders in it: one for each target."""
    found = [folder / REPORT, *sorted(folder.glob(f"*/{REPORT}"))]
    return [file for file in found if file.is_file()]


def _run_figures(report: Report, summary: RunSummary) -> tuple[ModelFigures, ...]:
    """Returns what report and summary have of the four models, the dense one first."""
    latency = {found.model: found for found in report.latency}
    rows = {
        "baseline": summary.dense,
        "bundle": summary.low_rank,
        "baseline, int8": summary.dense_int8,
        "bundle, int8": summary.low_rank_int8,
    }
    return tuple(
        ModelFigures(
            name=name,
            label=row.model,
            accuracy=row.accuracy,
            parameters=row.parameters,
            size_mb=row.size_mb,
            latency=latency.get(name),
            step_memory_mb=row.step_memory_mb,
        )
        for name, row in rows.items()
    )


def _facts(report: Report, manifest: Manifest | None = None) -> dict[str, str]:
    """Returns what the head of the page says of the model."""
    host = report.host
    facts = {"measured on": f"{host.processor}, {host.cores} cores, {host.machine}"}
    if manifest is None:
        return facts | {"bundle": report.bundle, "model.onnx": f"sha256 {report.model_sha256[:12]}…"}
    size = manifest.input
    return {
        "architecture": manifest.model.name,
        "input": f"{size.channels} × {size.height} × {size.width}, {len(manifest.classes)} classes",
        "exported": manifest.created,
    } | facts


def _stages(run: Path) -> Iterator[Stage]:
    """Yields the training of a run, as far as it is in the folder: dense runs may be elsewhere, shared."""
    stages: tuple[tuple[str, str, Series], ...] = (
        ("dense", "dense", "dense"),
        ("subspace", "low-rank", "own"),
    )
    for name, label, series in stages:
        path = run / name / "metrics.jsonl"
        if not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                lines = file.read(MAX_BYTES).splitlines()
            epochs = tuple(parse_document(line, Epoch) for line in lines if line.strip())
        except (OSError, MalformedError) as error:
            raise UsageError(f"{path} is not what training wrote: {error}: run it again") from error
        if epochs:
            yield Stage(label=label, series=series, epochs=epochs)


def _steps(memory: StepMemoryPair) -> Iterator[TrainingStep]:
    """Yields the curves of the training steps that were measured."""
    if memory.dense_curve is not None:
        yield TrainingStep(label="dense", series="dense", curve=memory.dense_curve)
    if memory.low_rank_curve is not None:
        yield TrainingStep(label="low-rank", series="own", curve=memory.low_rank_curve)
