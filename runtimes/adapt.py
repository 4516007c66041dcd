"""Training on the board: epochs over images, guarded, saved as it goes, resumed to the bit.

What is random follows from the seed and the position, the state is in the folder, and nothing else counts: a
training that was killed at any moment goes on from its last commit to the same end as one that was not.

Two guards. A loss that is not finite takes the training back to its last commit, at half the rate. And the
state it ends with is the best that held-out images have seen, the one it began with included: on those, no
training makes a model worse.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wasi_export.durable import fingerprint, locked_folder
from wasi_export.errors import ConfigError, DataError, HostError, ModelFailedError
from wasi_export.image_set import ImageSet
from wasi_export.interrupt import StopSignals, TrainingInterrupted, stop_signals
from wasi_export.progress import Track, silent
from wasi_export.runtimes.adapt_data import AdaptData
from wasi_export.runtimes.adapter import Adapter
from wasi_export.runtimes.augment import HFLIP, SCALE
from wasi_export.runtimes.budget import Budget
from wasi_export.runtimes.schedule import ScheduleName, learning_rate
from wasi_export.runtimes.state_folder import StateFolder
from wasi_export.settings import Frozen

Ended = Literal["", "epochs", "patience"]
"""Why there is no more to do; empty: there is."""
MAX_ROLLBACKS = 5
ROLLBACK_RATE = 0.5


class AdaptOptions(Frozen):
    """How a training goes about it."""

    epochs: int
    batch_size: int
    lr: float
    sched: ScheduleName
    warmup_steps: int
    seed: int = 0
    augment: bool = True
    scale: tuple[float, float] = SCALE
    hflip: float = HFLIP
    replay_share: float = 0.5
    patience: int | None = None
    """Epochs without a better accuracy after which it ends."""
    commit_every: int = 25
    """Steps."""
    micro_batch: int | None = None
    """Images in memory at a time; the step is that of the whole batch."""


class AdaptEpoch(Frozen):
    """One epoch, of which epoch 0 is the state before training."""

    epoch: int
    steps: int
    train_loss: float | None
    accuracy: float | None
    """On held-out images; None without any."""
    lr: float
    seconds: float


class AdaptProgress(Frozen):
    """How far a training is."""

    schema_version: Literal[1] = 1
    key: str
    """Hash of the step, the images and the options: a state goes on with these alone."""
    unreadable_images: int = 0
    """Files that were left out."""
    epoch: int = 0
    batch: int = 0
    step: int = 0
    rate: float = 1.0
    """By which the learning rate was lowered after losses that were not finite."""
    rollbacks: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    best_accuracy: float | None = None
    best_epoch: int = 0
    """The last epoch with that accuracy, whose state is kept."""
    improved_epoch: int = 0
    """The first one with it, from which patience counts."""
    history: tuple[AdaptEpoch, ...] = ()
    ended: Ended = ""


@dataclass(frozen=True)
class AdaptImages:
    """What is learnt, what is not to be forgotten, and what it is judged on."""

    new: ImageSet
    replay: ImageSet | None = None
    held_out: ImageSet | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of all of them."""
        return fingerprint(*(s.fingerprint if s else "" for s in (self.new, self.replay, self.held_out)))

    @property
    def unreadable(self) -> set[str]:
        """Names of files that cannot be read."""
        return {name for s in (self.new, self.replay, self.held_out) if s for name in s.unreadable}


HELD_OUT = 0.2


def adapt_images(new: ImageSet, replay: ImageSet | None, held_out: ImageSet | None) -> AdaptImages:
    """Returns what to train and to judge on; without images to judge on a fifth of all is held out.

    Raises:
        DataError: there are too few images to hold any out.
    """
    if held_out is not None:
        return AdaptImages(new, replay, held_out)
    new, judged = new.hold_out(HELD_OUT)
    if replay is not None:
        replay, more = replay.hold_out(HELD_OUT)
        judged = judged.join(more)
    return AdaptImages(new, replay, judged)


def adapt(
    adapter: Adapter,
    images: AdaptImages,
    options: AdaptOptions,
    folder: Path,
    *,
    budget: Budget | None = None,
    track: Track = silent,
    on_epoch: Callable[[AdaptEpoch], None] | None = None,
) -> AdaptProgress:
    """Trains the adapter on images, in place; returns how far it came. Goes on with what is in the folder.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came; the last step is saved.
        ConfigError: the folder has a training of another model, other images or options.
        DataError: an image cannot be read; the last step is saved.
        ModelFailedError: the loss is not finite however low the rate.
        HostError: the process takes more memory than it may; the last step is saved.
        UsageError: the folder cannot be written, or another process works in it.
    """
    with locked_folder(folder):
        return _Training(adapter, images, options, folder, budget or Budget(), track, on_epoch).run()


class _Training:
    """One call of `adapt`."""

    def __init__(
        self,
        adapter: Adapter,
        images: AdaptImages,
        options: AdaptOptions,
        folder: Path,
        budget: Budget,
        track: Track,
        on_epoch: Callable[[AdaptEpoch], None] | None,
    ) -> None:
        self.adapter, self.images, self.options = adapter, images, options
        self.budget, self.track, self.on_epoch = budget, track, on_epoch
        self.states = StateFolder(folder, AdaptProgress, adapter.identity)
        self.data = AdaptData(
            images.new,
            images.replay,
            adapter.bundle.manifest.input,
            options.batch_size,
            options.seed,
            replay_share=options.replay_share,
            augment=options.augment,
            scale=options.scale,
            hflip=options.hflip,
        )
        self.progress = AdaptProgress(
            key=fingerprint(adapter.identity, images.fingerprint, options),
            unreadable_images=len(images.unreadable),
        )

    def run(self) -> AdaptProgress:
        with stop_signals() as signals:
            try:
                self._resume()
                if not self.progress.history:
                    self._end_epoch(0, None, signals)
                while not self.progress.ended and self._train_epoch(signals):
                    pass
            except DataError:  # an image cannot be read now: where that was the disk, it goes on from here
                if self.progress.history:
                    self._commit()
                raise
            except TrainingInterrupted:
                self._commit()
                raise TrainingInterrupted(
                    f"interrupted at step {self.progress.step}: saved {self.states.path}, the same command "
                    "resumes"
                ) from None
        return self.progress

    def _resume(self) -> None:
        """Takes over what is in the folder, if there is anything, in place."""
        found = self.states.read()
        if found is None:
            return
        progress, tensors = found
        if progress.key != self.progress.key:
            raise ConfigError(
                f"{self.states.path} has a training of another model, other images or options (key "
                f"{progress.key}, this is {self.progress.key}): give the same to resume, or a new --state"
            )
        self.adapter.session.load_tensors(tensors)
        self.progress = progress

    def _train_epoch(self, signals: StopSignals) -> bool:
        """Trains to the end of an epoch, or back to the last commit; returns whether there is more to do."""
        done = self.progress.batch
        batches = self.data.batches(self.progress.epoch, done)
        label = f"epoch {self.progress.epoch + 1}/{self.options.epochs}"
        for inputs, labels in signals.guard(self.track(batches, label, len(self.data) - done)):
            if not self._step(inputs, labels):
                return True
            if self._is_spent(signals):
                return False
        self._end_epoch(self.progress.epoch + 1, self.progress.loss_sum / len(self.data), signals)
        return True

    def _step(self, inputs: NDArray[np.float32], labels: NDArray[np.int64]) -> bool:
        """Takes a step; returns False where its loss was not finite, and it was taken back."""
        started = time.perf_counter()
        micro = self.options.micro_batch
        result = self.adapter.step_result(inputs, labels, lr=self._rate(), micro_batch=micro)
        if not result.is_finite:
            self._roll_back(result.loss)
            return False
        self._advance(
            batch=self.progress.batch + 1,
            step=self.progress.step + 1,
            loss_sum=self.progress.loss_sum + result.loss,
            seconds=self.progress.seconds + time.perf_counter() - started,
        )
        if self.progress.step % self.options.commit_every == 0:
            self._commit()
        return True

    def _rate(self) -> float:
        steps = self.options.epochs * len(self.data)
        rate = learning_rate(
            self.options.sched,
            self.progress.step,
            lr=self.options.lr,
            steps=steps,
            warmup=self.options.warmup_steps,
        )
        return rate * self.progress.rate

    def _roll_back(self, loss: float) -> None:
        """Goes back to the last commit, which was finite, at a lower rate."""
        rollbacks = self.progress.rollbacks + 1
        if rollbacks > MAX_ROLLBACKS:
            raise ModelFailedError(
                f"the loss is {loss} at step {self.progress.step}, after {MAX_ROLLBACKS} returns to lower "
                f"rates: lower --lr (now {self.options.lr:g})"
            )
        self._resume()
        self._advance(rollbacks=rollbacks, rate=self.progress.rate * ROLLBACK_RATE)
        self._commit()

    def _is_spent(self, signals: StopSignals) -> bool:
        """Returns whether time or energy are over; what was done is saved then."""
        try:
            spent = self.budget.is_spent(lambda: signals.received)
        except HostError:
            self._commit()
            raise
        if spent:
            self._commit()
        return spent

    def _end_epoch(self, epoch: int, train_loss: float | None, signals: StopSignals) -> None:
        """Judges the state on held-out images, and keeps it where it is the best."""
        accuracy, best = self._accuracy(signals), self.progress.best_accuracy
        if accuracy is None or best is None or accuracy > best:
            self._advance(improved_epoch=epoch)
        if accuracy is None or best is None or accuracy >= best:
            self._advance(best_accuracy=accuracy, best_epoch=epoch)
            if accuracy is not None:
                self.states.keep_best(self.adapter.session.tensors())
        line = AdaptEpoch(
            epoch=epoch,
            steps=self.progress.step,
            train_loss=train_loss,
            accuracy=accuracy,
            lr=self._rate(),
            seconds=self.progress.seconds,
        )
        self._advance(epoch=epoch, batch=0, loss_sum=0.0, history=(*self.progress.history, line))
        if epoch == self.options.epochs:
            self._end("epochs")
        elif self.options.patience and epoch - self.progress.improved_epoch >= self.options.patience:
            self._end("patience")
        self._commit()
        if self.on_epoch is not None:
            self.on_epoch(line)

    def _end(self, reason: Ended) -> None:
        """Ends the training with its best state, in place."""
        self._advance(ended=reason)
        if self.progress.best_epoch != self.progress.epoch:
            self.adapter.session.load_tensors(self.states.best())

    def _accuracy(self, signals: StopSignals) -> float | None:
        if self.images.held_out is None:
            return None
        right = 0
        count = len(self.images.held_out)
        starts = range(0, count, self.options.batch_size)
        for start in signals.guard(self.track(starts, "evaluate", len(starts))):
            pairs = [
                self.images.held_out[i] for i in range(start, min(start + self.options.batch_size, count))
            ]
            found = self.adapter.predict([image for image, _ in pairs])
            right += int((found == np.array([label for _, label in pairs])).sum())
        return right / count

    def _advance(self, **changes: object) -> None:
        self.progress = self.progress.model_copy(update=changes)

    def _commit(self) -> None:
        self.states.commit(self.progress, self.adapter.session.tensors())
