"""One training stage, from a configuration to a finished run folder; the same for `train` and `run`."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from wasi_export.config import Config, TrainConfig, TrainMethod
from wasi_export.datasets import load_data
from wasi_export.durable import fingerprint, made_folder, sync_folder, write_bytes, writing
from wasi_export.errors import ArtifactExistsError, ConfigError, UsageError
from wasi_export.image_set import ImageSet
from wasi_export.manifest import CONFIG
from wasi_export.progress import Track, silent
from wasi_export.ranks import Plan
from wasi_export.run_folder import FACTS, OPTIMIZER, PLAN, WEIGHTS, RunFacts, shared_inputs, subspace_inputs
from wasi_export.subspace.inject import install_layers
from wasi_export.subspace.planner import load_plan
from wasi_export.subspace.targets import target_layers
from wasi_export.training.beginning import begin
from wasi_export.training.checkpoint import (
    read_facts,
    require_facts,
    save_run,
    write_config,
)
from wasi_export.training.data import Batch, make_loader
from wasi_export.training.first_part import first_part
from wasi_export.training.loop import METRICS, evaluate, fit
from wasi_export.training.lora import lora_layers, one_input
from wasi_export.training.models import input_spec
from wasi_export.training.planning import factorize
from wasi_export.training.processes import main_first, make_accelerator, on_main
from wasi_export.training.profile import PROFILE, StepProfiler
from wasi_export.training.resume import CHECKPOINT, EpochMetrics, position_to_resume, read_position

FIRST, LAST = 0, 1
"""Parts of a training: before layers are factored, and the last one, which may be the only one."""
RUN_FILES = frozenset({FACTS, WEIGHTS, CONFIG, PLAN, METRICS, CHECKPOINT, PROFILE, OPTIMIZER})


@dataclass(frozen=True)
class Profiling:
    """That the steps of a training are to be measured, into profile.json."""

    trace: Path | None = None
    """Where a Chrome trace of some of the steps goes; None: nowhere."""


def train_run(
    config: Config,
    method: TrainMethod,
    run_dir: Path,
    *,
    init: Path | None = None,
    force: bool = False,
    replace: bool = False,
    track: Track = silent,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    profiling: Profiling | None = None,
) -> RunFacts:
    """Trains one stage into a folder, resuming where it was interrupted; returns what came out.

    A finished run of the same key is returned as it is. Several processes train together when all call this;
    the main one writes the folder, displays and is measured.

    Args:
        config: the whole configuration.
        method: dense, or subspace with factored layers.
        run_dir: the run folder.
        init: a finished run whose weights are the first ones; None: those of `config.model`. One that is
            factored goes on as it is: with its factors, ranks and, from a board, its optimiser's state.
        force: start anew even where the folder holds this very run.
        replace: start anew where the folder holds a run of another configuration, instead of refusing.
        track: progress display.
        on_epoch: called with the metrics of each epoch as it ends.
        profiling: measure the steps as well.

    Raises:
        ArtifactExistsError: the folder holds another finished run, or other files.
        UsageError: the folder cannot be written, or there are no steps to measure.
        TrainingInterrupted: a signal came; the run can be resumed.
        ConfigError: `init` does not fit the configuration or the method, or `subspace.plan` the layers.
    """
    accelerator = make_accelerator()
    if not accelerator.is_main_process:
        track, on_epoch = silent, None
    # The main process first, which may download them.
    train, val = main_first(accelerator, lambda: load_data(config.data, track=track))
    key = on_main(accelerator, lambda: run_key(config, method, train, val, init))
    start = on_main(accelerator, lambda: _open_run(run_dir, config, key, force=force, replace=replace))
    if start.finished is not None:
        if profiling is not None:
            raise UsageError(
                f"{run_dir} is finished, no step is left to profile: give --force or a new folder"
            )
        return start.finished
    begun = main_first(accelerator, lambda: begin(config, train.classes, init))
    if begun.plan is not None and method == "dense":
        raise ConfigError(f"{init} is factored: give --method subspace to go on with it")
    model = begun.model
    spec = input_spec(model, config)
    val_loader = make_loader(val, spec, config.data, training=False)
    settings: TrainConfig = getattr(config.train, method)

    def train_epochs(
        epochs: range, settings: TrainConfig, *, part: int, profiler: StepProfiler | None = None
    ) -> tuple[EpochMetrics, ...]:
        return fit(
            model,
            make_loader(train, spec, config.data, training=True, seed=config.seed),
            val_loader,
            settings,
            run_dir,
            seed=config.seed,
            epochs=epochs,
            part=part,
            key=key,
            track=track,
            on_epoch=on_epoch,
            profiler=profiler,
            optimizer_state=begun.optimizer,
        )

    first_epochs = 0
    if begun.plan is not None:
        plan_text = begun.plan.model_dump_json(indent=2).encode()
        on_main(accelerator, lambda: write_bytes(run_dir / PLAN, plan_text))
    elif method == "subspace":
        if config.subspace.plan is not None:  # before any epoch, not after the first part
            load_plan(config.subspace.plan, target_layers(model, config.subspace))
        first = first_part(config, goes_on=init is not None)
        first_epochs = first.epochs
        if first_epochs and not start.factored:
            with ExitStack() as stack:
                if first.lora:
                    x = one_input(config, model, train)
                    stack.enter_context(lora_layers(model, config.subspace, x, seed=config.seed))
                train_epochs(range(first_epochs), first.train, part=FIRST)

        def make_plan() -> Plan:
            plan = factorize(config, model, train, track=track)
            write_bytes(run_dir / PLAN, plan.model_dump_json(indent=2).encode())
            return plan

        plan = on_main(accelerator, lambda: Plan.load(run_dir / PLAN) if start.factored else make_plan())
        if start.factored or not accelerator.is_main_process:
            install_layers(model, plan)  # the values come from the checkpoint, or from the main process
    profiler = None
    if profiling is not None and accelerator.is_main_process:
        profiler = StepProfiler(model, trace=profiling.trace)
    epochs = range(first_epochs, settings.epochs)
    history = train_epochs(epochs, settings, part=LAST, profiler=profiler)

    def finish() -> RunFacts:
        facts = RunFacts(
            name=config.name,
            method=method,
            classes=train.classes,
            input=spec,
            seed=config.seed,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            metrics=(_summary(history) or _evaluated(model, track(val_loader, "evaluate", len(val_loader))))
            | _left_out(train, val),
            data_fingerprint=train.fingerprint,
            key=key,
            weights_sha256="",
        )
        facts = save_run(run_dir, model, config, facts)
        (run_dir / CHECKPOINT).unlink(missing_ok=True)
        if profiler is not None:
            write_bytes(run_dir / PROFILE, (profiler.result().model_dump_json(indent=2) + "\n").encode())
        return facts

    return on_main(accelerator, finish)


def run_key(config: Config, method: TrainMethod, train: ImageSet, val: ImageSet, init: Path | None) -> str:
    """Returns the hash of all that the weights of a run follow from.

    Raises:
        IntegrityError: `init` is no finished run.
    """
    return fingerprint(
        method,
        *shared_inputs(config, train, val),
        subspace_inputs(config) if method == "subspace" else None,
        getattr(config.train, method),
        None if init is None else require_facts(init).weights_sha256,
    )


def _summary(history: tuple[EpochMetrics, ...]) -> dict[str, float]:
    if not history:
        return {}
    return {
        "val_accuracy": history[-1].val_accuracy,
        "val_loss": history[-1].val_loss,
        "train_loss": history[-1].train_loss,
        "epochs": len(history),
        "seconds": sum(metrics.seconds for metrics in history),
        "cpu_seconds": sum(metrics.cpu_seconds for metrics in history),
    }


def _evaluated(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    result = evaluate(model, batches)
    return {"val_accuracy": result.accuracy, "val_loss": result.loss, "epochs": 0}


def _left_out(train: ImageSet, val: ImageSet) -> dict[str, float]:
    """Returns how many files of images could not be read, where there are any."""
    names = {*train.unreadable, *val.unreadable}
    return {"unreadable_images": len(names)} if names else {}


@dataclass(frozen=True)
class _Start:
    """What a run folder holds of the run that is to be trained into it."""

    finished: RunFacts | None = None
    factored: bool = False
    """Whether an unfinished training has factored its layers."""


def _open_run(run_dir: Path, config: Config, key: str, *, force: bool, replace: bool) -> _Start:
    """Makes the run folder ready, in place: empties what is to be replaced, refuses what is not ours."""
    _open_folder(run_dir)
    if force or (replace and _key_in(run_dir) != key):
        empty_run(run_dir)
    facts = read_facts(run_dir)
    if facts is None:
        position = position_to_resume(run_dir / CHECKPOINT, key)
        return _Start(factored=position is not None and position.part == LAST)
    if facts.key != key:
        raise ArtifactExistsError(
            f"{run_dir} holds a finished run of another configuration (key {facts.key}, this is {key}): "
            "choose another folder or give --force"
        )
    write_config(run_dir, config)  # what the weights do not follow from may be new
    return _Start(finished=facts)


def _open_folder(run_dir: Path) -> None:
    """Makes the run folder; refuses one that holds other things."""
    with writing(run_dir), made_folder(run_dir):
        pass
    names = (path.name for path in run_dir.iterdir())
    others = sorted(name for name in names if name not in RUN_FILES and not name.startswith("."))
    if others:
        raise ArtifactExistsError(f"{run_dir} holds other files ({', '.join(others[:3])}): name a new folder")


def _key_in(run_dir: Path) -> str | None:
    """Returns the key of the finished or unfinished run in a folder."""
    found = read_facts(run_dir) or read_position(run_dir / CHECKPOINT)
    return None if found is None else found.key


def empty_run(run_dir: Path) -> None:
    """Deletes the files of a run; first, for good, the one without which there is no finished run."""
    (run_dir / FACTS).unlink(missing_ok=True)
    sync_folder(run_dir)
    for name in RUN_FILES:
        (run_dir / name).unlink(missing_ok=True)
