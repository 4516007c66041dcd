"""The stages of `wasi-export run`, from images to a validated bundle; what is done is not done again."""

from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

from wasi_export.cli._console import note, track
from wasi_export.cli._stages import StageCache, StageKeys
from wasi_export.cli._summary import MEMORY, PAGE, RunSummary, StepMemoryPair, read_document
from wasi_export.cli._target import SUMMARY
from wasi_export.cli._torch import prepare_torch
from wasi_export.cli.train import epoch_line
from wasi_export.config import Config, TrainMethod
from wasi_export.durable import locked_folder, write_bytes
from wasi_export.errors import HostError, MissingExtraError


class Pipeline:
    """The stages of one run, each done only where its inputs have changed."""

    def __init__(
        self, config: Config, folder: Path, *, dense: Path | None = None, force: bool = False
    ) -> None:
        """Finds out what is done in a folder.

        Args:
            config: of the run.
            folder: of its results.
            dense: folder of the dense run, which others may use as well; None: one of its own.
            force: do everything anew.

        Raises:
            IntegrityError: the folder does not hold what was written.
        """
        self.config, self.folder, self.force = config, folder, force
        self.keys, self.cache = StageKeys.of(config, track=track), StageCache(folder)
        self.shares_dense = dense is not None
        self.run_dirs: dict[TrainMethod, Path] = {
            "dense": dense or folder / "dense",
            "subspace": folder / "subspace",
        }

    def finished(self) -> RunSummary | None:
        """Returns the summary of what is finished; None where a stage is still to be done.

        Raises:
            IntegrityError: the summary is not what was written.
        """
        report = self.folder / "report"
        files = [report / name for name in (SUMMARY, "report.json", "report.md", "report.junit.xml")]
        files += [self.folder / "baseline", self.folder / "bundle"]
        if self.force or not self.cache.is_done("report", self.keys.report, files):
            return None
        return read_document(RunSummary, report / SUMMARY)

    def run(self) -> RunSummary:
        """Does what is not done yet; returns the summary.

        Raises:
            UsageError: another process works in the folder.
        """
        with locked_folder(self.folder):
            self.cache = StageCache(self.folder)  # as whoever had the lock before left it
            if (summary := self.finished()) is not None:
                return self._with_page(summary)
            if self.force:
                self.cache.clear()
            report = self.folder / "report"
            with self._run_dir("dense"):
                self._train("dense", self.keys.dense)
            with self._run_dir("subspace"):
                self._train("subspace", self.keys.subspace)
            with self._run_dir("dense"):
                self._export("dense", "baseline", self.keys.baseline)
            self._export("subspace", "bundle", self.keys.bundle)
            self._measure_memory(report / MEMORY)
            self._validate(report)
            return self._with_page(read_document(RunSummary, report / SUMMARY))

    def _run_dir(self, method: TrainMethod) -> AbstractContextManager[None]:
        """Returns the context in which a run folder is ours alone; it waits for those that share it."""
        return locked_folder(self.run_dirs[method], wait=method == "dense" and self.shares_dense)

    def _train(self, method: TrainMethod, key: str) -> None:
        """Trains a stage, or resumes it; the subspace stage starts from the dense one."""
        run_dir = self.run_dirs[method]
        if self.cache.is_done(method, key, [run_dir]):
            return
        prepare_torch()
        from wasi_export.training.stage import train_run

        was_done = self.cache.begin(method)
        note(f"{method}: training, {run_dir}")
        train_run(
            self.config,
            method,
            run_dir,
            init=self.run_dirs["dense"] if method == "subspace" else None,
            # What others use as well is finished for this configuration, or is not.
            force=(self.force or was_done) and not (method == "dense" and self.shares_dense),
            replace=True,
            track=track,
            on_epoch=lambda metrics: note(f"  {epoch_line(metrics)}"),
        )
        self.cache.finish(method, key)

    def _export(self, method: TrainMethod, name: str, key: str) -> None:
        """Exports what a stage trained into a bundle."""
        destination = self.folder / name
        if self.cache.is_done(name, key, [destination]):
            return
        prepare_torch()
        from wasi_export.cli._bundle import export_run
        from wasi_export.training.checkpoint import write_config

        self.cache.begin(name)
        note(f"{name}: exporting, {destination}")
        write_config(self.run_dirs[method], self.config)  # its export section may be newer than the run
        # What a board goes on training is the low-rank model.
        overrides = ["export.train_graph=false"] if method == "dense" else []
        export_run(self.run_dirs[method], destination, overrides=overrides, force=True, track=track)
        self.cache.finish(name, key)

    def _measure_memory(self, path: Path) -> None:
        """Measures the memory of a training step, dense and low-rank: its peak where the system tells it."""
        if self.cache.is_done("memory", self.keys.memory, [path]):
            return
        prepare_torch()
        from wasi_export.training.checkpoint import load_run
        from wasi_export.training.memory import StepJob, measure_step_memory
        from wasi_export.training.memory_curve import record_step_curve

        def job(method: TrainMethod) -> StepJob:
            run = load_run(self.run_dirs[method])
            return StepJob(
                model=self.config.model,
                train=getattr(self.config.train, method),
                input=run.facts.input,
                num_classes=len(run.facts.classes),
                plan=run.plan,
                batch_size=self.config.data.batch_size,
            )

        self.cache.begin("memory")
        note("memory: measuring training steps")
        dense, low_rank = job("dense"), job("subspace")
        found = StepMemoryPair(
            dense_curve=record_step_curve(dense), low_rank_curve=record_step_curve(low_rank)
        )
        try:
            peaks = {
                "dense_mb": measure_step_memory(dense).peak_mb,
                "low_rank_mb": measure_step_memory(low_rank).peak_mb,
            }
        except HostError as error:
            note(f"  peak not measured: {error}")
            peaks = {}
        write_bytes(path, found.model_copy(update=peaks).model_dump_json().encode())
        self.cache.finish("memory", self.keys.memory)

    def _validate(self, folder: Path) -> None:
        """Validates the bundle against the baseline, on the validation images, and writes the report.

        int8 graphs of both are in it even where no bundle ships one: low rank is up against dense int8 too.
        """
        from wasi_export.artifact import Bundle
        from wasi_export.cli._quantize import int8_graph
        from wasi_export.datasets import load_data
        from wasi_export.runtimes.validate import validate, write_report

        self.cache.begin("report")
        note(f"report: validating, {folder}")
        baseline, bundle = Bundle.open(self.folder / "baseline"), Bundle.open(self.folder / "bundle")
        images = load_data(self.config.data, track=track)[1]
        memory = read_document(StepMemoryPair, folder / MEMORY)
        with TemporaryDirectory() as scratch:
            int8 = {
                f"{name}, int8": int8_graph(owner, Path(scratch) / f"{name}.onnx")
                for name, owner in (("baseline", baseline), ("bundle", bundle))
            }
            report = validate(
                bundle,
                self.config.thresholds,
                baseline=baseline,
                images=images,
                beside=[(name, path) for name, path in int8.items() if path.parent == Path(scratch)],
                track=track,
            )
            summary = RunSummary.of(
                report, baseline, bundle, int8=int8, memory=memory, report_path=folder / "report.md"
            )
        write_report(report, folder)
        write_bytes(folder / SUMMARY, (summary.model_dump_json(indent=2) + "\n").encode())
        (folder / PAGE).unlink(missing_ok=True)  # it shows the report before this one
        self.cache.finish("report", self.keys.report)

    def _with_page(self, summary: RunSummary) -> RunSummary:
        """Returns the summary with the page of the report, which is written where it is not there yet."""
        from wasi_export.cli._report_inputs import read_inputs
        from wasi_export.report_page import render_page

        page = self.folder / "report" / PAGE
        if not page.exists():
            try:
                write_bytes(page, render_page(read_inputs(self.folder)))
            except MissingExtraError:
                return summary
        return summary.model_copy(update={"page": page})
