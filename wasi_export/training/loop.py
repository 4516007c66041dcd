"""The training loop, the same for dense and factored models: timm's parts, accelerate's devices.

A run can be stopped after any step and resumed to bit-identical weights: the order of the images, their
augmentation, mixup, dropout and the learning rate follow from the seed and the position alone, and
everything else is in the checkpoint. It may be resumed on another number of processes, see `processes.py`.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from wasi_export.config import TrainConfig
from wasi_export.durable import write_bytes
from wasi_export.errors import DataError
from wasi_export.interrupt import TrainingInterrupted, stop_signals
from wasi_export.progress import Track, silent
from wasi_export.training.data import Batch, EpochBatches
from wasi_export.training.ladder import saving_memory
from wasi_export.training.optim import common_rate, create_optimizer, create_scheduler
from wasi_export.training.processes import (
    check_shares,
    largest_share,
    make_accelerator,
    share_evaluation,
    sum_over_processes,
)
from wasi_export.training.profile import Profiler, Unprofiled
from wasi_export.training.resume import (
    CHECKPOINT,
    EpochMetrics,
    Position,
    position_to_resume,
    restore,
    save_position,
)
from wasi_export.training.step import TrainingStep
from wasi_export.training.warm_optimizer import take_over

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and top-1 accuracy over `count` images."""

    loss: float
    accuracy: float
    count: int


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator | None = None
) -> Evaluation:
    """Returns loss and accuracy of the model over all batches; the model stays in the mode it was in.

    With an accelerator the batches are this process's share, and the result is over those of all processes.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, correct, count = 0.0, 0, 0
    try:
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
            count += len(labels)
    finally:
        model.train(was_training)
    if accelerator is not None:
        loss, *counts = sum_over_processes(accelerator, (loss, correct, count))
        correct, count = map(int, counts)
    return Evaluation(loss / count, correct / count, count)


def fit(
    model: nn.Module,
    train_loader: DataLoader[Batch],
    val_loader: DataLoader[Batch],
    config: TrainConfig,
    run_dir: Path | None,
    *,
    seed: int,
    epochs: range | None = None,
    part: int = 0,
    key: str = "",
    track: Track = silent,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    profiler: Profiler | None = None,
    optimizer_state: Mapping[str, Tensor] | None = None,
) -> tuple[EpochMetrics, ...]:
    """Trains the model, in place; returns the metrics of every epoch, those before a resume too.

    Args:
        model: a timm model, dense or factored.
        train_loader: of `make_loader(training=True)`.
        val_loader: evaluated after each epoch.
        config: epochs, optimiser, schedule and regularisation.
        run_dir: where metrics.jsonl and the checkpoint go and where a run resumes from; None keeps nothing.
        seed: of dropout, stochastic depth and mixup.
        epochs: which of the config's epochs to train, from 0; None: all. The schedule is that of all of them,
            with a warm-up of its own where they do not start with the first.
        part: of the training; a checkpoint of another part has other layers, and is not restored.
        key: of the configuration and start; a checkpoint with another key is refused.
        track: progress display.
        on_epoch: called with the metrics of each epoch as it ends.
        profiler: measures the steps.
        optimizer_state: what the optimiser begins with, by parameter and moment; None: nothing.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came; the last whole step is saved where there is a run_dir.
        DataError: an image cannot be read any more; the last whole step is saved, likewise.
        ConfigError: unknown optimiser or schedule, a checkpoint of another configuration, or a batch that
            the processes cannot share.
        ModelFailedError: the loss is not finite.
    """
    batches = train_loader.batch_sampler
    if not isinstance(batches, EpochBatches):
        raise TypeError("train_loader must come from make_loader(training=True)")
    profiler = profiler or Unprofiled()
    accelerator = make_accelerator()
    processes = accelerator.num_processes
    check_shares(batches.batch_size, config, processes=processes)
    model.to(accelerator.device).train()
    optimizer = create_optimizer(model, config)
    if optimizer_state:
        take_over(optimizer, model, optimizer_state)
    epochs = range(config.epochs) if epochs is None else epochs
    loader = accelerator.prepare(train_loader)
    steps = len(loader)
    position = Position(key=key, part=part, epoch=epochs.start, step=epochs.start * steps)
    checkpoint = None if run_dir is None else run_dir / CHECKPOINT
    if checkpoint is not None and (found := position_to_resume(checkpoint, key)):
        position = found.model_copy(update={"part": part})
        if found.part == part:
            restore(checkpoint, found, model, optimizer)

    val_batches = share_evaluation(val_loader, processes=processes, index=accelerator.process_index)
    val_rounds = largest_share(len(val_loader), processes=processes)
    scheduler = create_scheduler(optimizer, config, config.epochs * steps, start=epochs.start * steps)
    step = TrainingStep(
        accelerator,
        accelerator.prepare(model),
        accelerator.prepare(optimizer),
        config,
        seed=seed,
        phase=profiler.phase,
    )

    def save() -> None:
        if run_dir is not None and checkpoint is not None and accelerator.is_main_process:
            lines = "".join(f"{metrics.model_dump_json()}\n" for metrics in position.history)
            write_bytes(run_dir / METRICS, lines.encode())
            save_position(checkpoint, position, model, optimizer)

    def any_process(received: bool) -> bool:
        return sum_over_processes(accelerator, (received,))[0] > 0

    memory = saving_memory(model, optimizer, config, mixed_precision=accelerator.mixed_precision)
    with memory, stop_signals(any_process) as signals, profiler:
        try:
            for epoch in range(position.epoch, epochs.stop):
                batches.go_to(epoch, position.batch)
                remaining = steps - position.batch
                label = f"epoch {epoch + 1}/{config.epochs}"
                clock = _Clock()
                loaded = profiler.loading(loader) if remaining else ()
                for images, labels in signals.guard(track(loaded, label, remaining)):
                    scheduler.step_update(position.step)
                    loss = step(images, labels, position.step)
                    profiler.end_step()
                    wall, cpu = clock.lap()
                    position = position.model_copy(
                        update={
                            "batch": position.batch + 1,
                            "step": position.step + 1,
                            "loss_sum": position.loss_sum + loss,
                            "seconds": position.seconds + wall,
                            "cpu_seconds": position.cpu_seconds + cpu,
                        }
                    )
                result = evaluate(
                    model, signals.guard(track(val_batches, "evaluate", val_rounds), val_rounds), accelerator
                )
                scheduler.step_update(position.step - 1)  # a resume may have taken no step
                metrics = EpochMetrics(
                    epoch=epoch + 1,
                    step=position.step,
                    train_loss=position.loss_sum / steps,
                    val_loss=result.loss,
                    val_accuracy=result.accuracy,
                    lr=common_rate(model, optimizer),
                    seconds=position.seconds,
                    cpu_seconds=position.cpu_seconds,
                    images_per_second=steps * batches.batch_size / position.seconds,
                )
                position = Position(
                    key=key,
                    epoch=epoch + 1,
                    step=position.step,
                    part=part,
                    history=(*position.history, metrics),
                )
                save()
                if on_epoch is not None:
                    on_epoch(metrics)
        except DataError as error:  # an image cannot be read any more
            if position.step > epochs.start * steps:
                save()
            raise DataError(
                f"{_told_by_worker(error)}; stopped at epoch {position.epoch + 1}, step {position.step}: "
                + (f"saved {checkpoint}, the same command goes on" if checkpoint else "nothing is kept")
            ) from error
        except TrainingInterrupted:
            save()
            accelerator.wait_for_everyone()  # a launcher ends all processes once one has ended
            raise TrainingInterrupted(
                f"interrupted at epoch {position.epoch + 1}, step {position.step}: "
                + (f"saved {checkpoint}, the same command resumes" if checkpoint else "nothing is kept")
            ) from None
    return position.history


def _told_by_worker(error: DataError) -> str:
    """Returns the message of an error; that of a loader's worker has its traceback before it."""
    return str(error).rstrip().rpartition(f"{DataError.__name__}: ")[2]


class _Clock:
    """Wall and processor time in seconds, lap by lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        wall, cpu = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        return wall, cpu
