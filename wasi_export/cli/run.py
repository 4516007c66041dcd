"""`wasi-export run`: everything, from images to a validated bundle, each stage done once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wasi_export.cli._config import ConfigFile, Overrides, read_config
from wasi_export.cli._console import JsonFlag, exit_codes, print_json, print_table, track
from wasi_export.cli._torch import prepare_torch
from wasi_export.cli.train import epoch_line

if TYPE_CHECKING:
    from wasi_export.cli._stages import StageCache, StageKeys
    from wasi_export.cli._summary import RunSummary
    from wasi_export.config import Config, TrainMethod


@exit_codes
def run(
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of all results. Default: runs/NAME.")
    ] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Do every stage anew.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration, every key with its value, and stop.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train dense, then low-rank, export both, validate, and print one table.

    A stage whose inputs have not changed is not done again; one that was interrupted resumes. The exit code
    is that of the validation.
    """
    settings = read_config(config, overrides)
    if dry_run:
        if as_json:
            print_json(settings)
        else:
            typer.echo(settings.to_toml(), nl=False)
        return
    from wasi_export.cli._stages import StageCache, StageKeys

    folder = out or Path("runs") / settings.name
    cache = StageCache(folder)
    if force:
        cache.clear()
    summary = _Pipeline(settings, folder, StageKeys.of(settings), cache, force=force).run()
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)
    raise typer.Exit(summary.exit_code)


class _Pipeline:
    """The stages of one run, each done only where its inputs have changed."""

    def __init__(
        self, config: "Config", folder: Path, keys: "StageKeys", cache: "StageCache", *, force: bool
    ) -> None:
        self.config, self.folder, self.keys, self.cache, self.force = config, folder, keys, cache, force

    def run(self) -> "RunSummary":
        """Does what is not done yet; returns the summary."""
        from wasi_export.cli._summary import RunSummary, read_document

        report = self.folder / "report"
        files = [report / name for name in ("summary.json", "report.json", "report.md")]
        if not self.cache.is_done("report", self.keys.report, files):
            self._train("dense", self.keys.dense)
            self._train("subspace", self.keys.subspace)
            self._export("dense", "baseline", self.keys.baseline)
            self._export("subspace", "bundle", self.keys.bundle)
            self._measure_memory(report / "memory.json")
            self._validate(report)
        return read_document(RunSummary, report / "summary.json")

    def _train(self, method: "TrainMethod", key: str) -> None:
        """Trains a stage, or resumes it; the subspace stage starts from the dense one."""
        run_dir = self.folder / method
        if self.cache.is_done(method, key, [run_dir]):
            return
        prepare_torch()
        from wasi_export.training.stage import train_run

        was_done = self.cache.begin(method)
        _say(f"{method}: training, {run_dir}")
        train_run(
            self.config,
            method,
            run_dir,
            init=self.folder / "dense" if method == "subspace" else None,
            force=self.force or was_done,
            replace=True,
            track=track,
            on_epoch=lambda metrics: _say(f"  {epoch_line(metrics)}"),
        )
        self.cache.finish(method, key)

    def _export(self, method: "TrainMethod", name: str, key: str) -> None:
        """Exports what a stage trained into a bundle."""
        destination = self.folder / name
        if self.cache.is_done(name, key, [destination]):
            return
        prepare_torch()
        from wasi_export.cli._bundle import export_run
        from wasi_export.training.checkpoint import write_config

        self.cache.begin(name)
        _say(f"{name}: exporting, {destination}")
        write_config(self.folder / method, self.config)  # its export section may be newer than the run
        export_run(self.folder / method, destination, force=True)
        self.cache.finish(name, key)

    def _measure_memory(self, path: Path) -> None:
        """Measures the peak memory of a training step, dense and low-rank, where the system tells it."""
        if self.cache.is_done("memory", self.keys.memory, [path]):
            return
        prepare_torch()
        from wasi_export.artifact import write_bytes
        from wasi_export.cli._summary import StepMemoryPair
        from wasi_export.errors import HostError
        from wasi_export.training.checkpoint import load_run
        from wasi_export.training.memory import StepJob, measure_step_memory

        def measure(method: "TrainMethod") -> float:
            run = load_run(self.folder / method)
            job = StepJob(
                model=self.config.model,
                train=getattr(self.config.train, method),
                input=run.facts.input,
                num_classes=len(run.facts.classes),
                plan=run.plan,
                batch_size=self.config.data.batch_size,
            )
            return measure_step_memory(job).peak_mb

        self.cache.begin("memory")
        _say("memory: measuring training steps")
        try:
            pair = StepMemoryPair(dense_mb=measure("dense"), low_rank_mb=measure("subspace"))
        except HostError as error:
            _say(f"  not measured: {error}")
            pair = StepMemoryPair()
        write_bytes(path, pair.model_dump_json().encode())
        self.cache.finish("memory", self.keys.memory)

    def _validate(self, folder: Path) -> None:
        """Validates the bundle against the baseline, on the validation images, and writes the report."""
        from wasi_export.artifact import Bundle, write_bytes
        from wasi_export.cli._summary import RunSummary, StepMemoryPair, read_document
        from wasi_export.datasets import load_data
        from wasi_export.runtimes.validate import validate, write_report

        self.cache.begin("report")
        _say(f"report: validating, {folder}")
        baseline, bundle = Bundle.open(self.folder / "baseline"), Bundle.open(self.folder / "bundle")
        images = load_data(self.config.data)[1]
        report = validate(bundle, self.config.thresholds, baseline=baseline, images=images, track=track)
        write_report(report, folder)
        memory = read_document(StepMemoryPair, folder / "memory.json")
        summary = RunSummary.of(report, baseline, bundle, memory=memory, report_path=folder / "report.md")
        write_bytes(folder / "summary.json", (summary.model_dump_json(indent=2) + "\n").encode())
        self.cache.finish("report", self.keys.report)


def _print_summary(summary: "RunSummary") -> None:
    from wasi_export.cli._summary import COLUMNS

    rows = (summary.dense.cells(), summary.low_rank.cells())
    print_table(f"{summary.name}: {summary.verdict}", COLUMNS, rows)
    typer.echo(f"bundle: {summary.bundle}")
    typer.echo(f"report: {summary.report}")


def _say(line: str) -> None:
    typer.echo(line, err=True)
