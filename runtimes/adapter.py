"""On-device training from Python: a step, a prediction, save and load, with numpy alone.

adapter = Adapter.open("bundle")
loss = adapter.step(images, labels)     # images: of Pillow, or arrays [B, C, H, W] as the model takes them
classes = adapter.predict(images)
adapter.save("by-hand")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wasi_export.artifact import Bundle
from wasi_export.errors import DataError, IntegrityError
from wasi_export.runtimes.accuracy import answers_of
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.state_folder import StateFolder, read_state
from wasi_export.runtimes.training_session import StepResult, TrainingSession
from wasi_export.settings import Frozen

Images = Sequence[Image.Image] | NDArray[np.float32]


class Saved(Frozen):
    """Header of a state that was saved by hand: it goes with no progress."""


class Adapter:
    """A bundle that learns. Its settings are those it was exported with; a step may have others."""

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        """Loads the training step.

        Raises:
            UsageError: the bundle has none.
            HostError: the graph needs a newer onnxruntime.
            ModelFailedError: it does not load.
        """
        self.bundle = bundle
        self.session = TrainingSession.open(bundle, threads=threads)
        self.settings = self.session.facts.settings
        self.preprocess = Preprocess(bundle.manifest.input)

    @classmethod
    def open(cls, path: str | Path, *, threads: int = 1) -> Self:
        """Returns the adapter of the bundle in a folder, after its files were checked.

        Raises:
            IntegrityError: a file is not what the manifest says.
            UsageError: the bundle has no training step.
        """
        return cls(Bundle.open(Path(path)), threads=threads)

    def step(
        self,
        images: Images,
        labels: Sequence[int] | NDArray[np.int64],
        *,
        lr: float | None = None,
        micro_batch: int | None = None,
    ) -> float:
        """Takes one step and returns the loss before it.

        Args:
            images: [B, C, H, W], normalised, or images of any size.
            labels: [B], indices of classes; where the loss takes such, targets [B, classes].
            lr: learning rate; None: that of the settings.
            micro_batch: images that are in memory at a time, with what is kept of them; None: all.

        Raises:
            DataError: there are not as many labels as images, or a label is no class.
            UsageError: the bundle was not exported for micro-batches.
            ModelFailedError: the graph cannot take the images.
        """
        targets = self._targets(labels, len(images))
        return self.step_result(self.inputs(images), targets, lr=lr, micro_batch=micro_batch).loss

    def step_result(
        self,
        inputs: NDArray[np.float32],
        targets: NDArray[np.int64] | NDArray[np.float32],
        *,
        lr: float | None,
        micro_batch: int | None = None,
    ) -> StepResult:
        """Takes one step on inputs of the model; returns all that it tells of itself."""
        clip, size = self.settings.clip_grad, micro_batch or max(1, len(inputs))
        for start in range(0, max(1, len(inputs)), size):
            result = self.session.step(
                inputs[start : start + size],
                targets[start : start + size],
                lr=self.settings.lr if lr is None else lr,
                weight_decay=self.settings.weight_decay,
                clip_norm=float("inf") if clip is None else clip,
                last=start + size >= len(inputs),
            )
        return result

    def predict(self, images: Images) -> NDArray[np.int64]:
        """Returns the index of the class of each image; -1 where an output is not a number.

        Raises:
            ModelFailedError: the graph cannot take the images.
        """
        return answers_of(self.session.outputs(self.inputs(images)))

    def inputs(self, images: Images) -> NDArray[np.float32]:
        """Returns images as the model takes them, [B, C, H, W]."""
        return images if isinstance(images, np.ndarray) else self.preprocess.batch(images)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Returns copies of the trained parameters, by name."""
        tensors = self.session.tensors()
        return {name: tensors[name] for name in self.session.facts.parameters}

    def set_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Takes over parameters, all or some, by name; the optimiser's state stays.

        Raises:
            IntegrityError: a name or a shape is not of this model; then nothing is changed.
        """
        if unknown := sorted(weights.keys() - set(self.session.facts.parameters)):
            raise IntegrityError(f"{', '.join(unknown[:3])} is not trained by {self.bundle.path}")
        self.session.load_tensors(weights)

    def save(self, folder: str | Path) -> None:
        """Writes parameters and optimiser state, whole or not at all; `load` and `merge` take the folder.

        Raises:
            UsageError: the folder cannot be written.
            ConfigError: it has a state that `wasi-export adapt` wrote.
        """
        states = StateFolder(Path(folder), Saved, self.identity)
        states.commit(Saved(), self.session.tensors())

    def load(self, folder: str | Path) -> None:
        """Takes over what was saved.

        Raises:
            IntegrityError: there is nothing, or it is damaged.
            ConfigError: it is of another bundle.
        """
        self.session.load_tensors(read_state(Path(folder), self.identity))

    @property
    def identity(self) -> str:
        """Hash of the training step: a state goes with this one."""
        return self.bundle.training_identity

    def _targets(
        self, labels: Sequence[int] | NDArray[np.int64], count: int
    ) -> NDArray[np.int64] | NDArray[np.float32]:
        targets = np.asarray(labels)
        if len(targets) != count:
            raise DataError(f"{count} images and {len(targets)} labels: give one label for each image")
        if self.settings.loss != "cross_entropy":
            return targets.astype(np.float32)
        classes = len(self.bundle.manifest.classes)
        if targets.size and not 0 <= targets.min() <= targets.max() < classes:
            raise DataError(
                f"labels go from {targets.min()} to {targets.max()}, the model has {classes} classes"
            )
        return targets.astype(np.int64)
