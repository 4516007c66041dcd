"""The training step of a bundle in onnxruntime: parameters and optimiser state are its own, in place.

The step writes the new state over the old one: its graph was checked for that when it was exported
(`converters/step_graph/in_place.py`), so the state is in memory once. No number leaves the buffers from step
to step but the loss, the count of right answers and the norm of the gradient.

Where the step was exported in two halves, an update may be that of several batches: `step(…, last=False)`
adds to the sums of the gradients alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from wasi_export.artifact import Bundle
from wasi_export.errors import IntegrityError, ModelFailedError, UsageError
from wasi_export.manifest import BASES, EVALUATE, PARAMETERS, STEP, UPDATE, TrainingGraph
from wasi_export.runtimes.bound_graph import BoundGraph
from wasi_export.runtimes.session import one_line, open_model, session_options
from wasi_export.untrusted.tensors import load_unchecked

Tensors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class StepResult:
    """What a step tells of itself, before its update; of all images that the update is of, so far."""

    loss: float
    correct: int
    gradient_norm: float | None
    """Before it was clipped; None where there was no update yet."""

    @property
    def is_finite(self) -> bool:
        """Whether its numbers are."""
        return math.isfinite(self.loss) and (self.gradient_norm is None or math.isfinite(self.gradient_norm))


class TrainingSession:
    """A training step that can be taken again and again, and the forward pass with the parameters it has."""

    def __init__(
        self, step: Path, evaluate: Path, facts: TrainingGraph, parameters: Tensors, *, threads: int = 1
    ) -> None:
        """Loads the step, its optimiser at the start; the forward pass is loaded when it is first asked for.

        Args:
            step: the graph; its second half, where it has one, is beside it.
            evaluate: graph of the forward pass.
            facts: of the manifest.
            parameters: that are trained, and the bases that the step begins with.
            threads: of onnxruntime.

        Raises:
            HostError: the graph needs a newer onnxruntime.
            ModelFailedError: it does not load.
            IntegrityError: the state is not that of the graph.
        """
        self.facts, self.threads = facts, threads
        self._evaluate_path = evaluate
        self._evaluate: ort.InferenceSession | None = None
        self._step = BoundGraph(step, step_options(threads=threads))
        self._update: BoundGraph | None = None
        if facts.settings.accumulate:
            self._update = BoundGraph(step.with_name(Path(UPDATE).name), step_options(threads=threads))
        self._images = next(iter(self._step.inputs))
        shapes = dict(self._step.inputs) | (dict(self._update.inputs) if self._update else {})
        stored = (*facts.parameters, *facts.bases)
        self._state = {name: _buffer(parameters, name, shapes[name]) for name in stored}
        zeros = (name for name in (*facts.optimizer, *facts.sums) if name not in self._state)
        self._state |= {name: _zeros(shapes[name]) for name in zeros}
        self._step.bind(self._state)
        if self._update is not None:
            self._update.bind(self._state)
        self._is_part_done = False

    @classmethod
    def open(cls, bundle: Bundle, *, threads: int = 1) -> Self:
        """Returns the step of a bundle, with the state it begins with.

        Raises:
            UsageError: the bundle has none.
            IntegrityError: its state is not that of its graph.
            HostError: the graph needs a newer onnxruntime.
            ModelFailedError: it does not load.
        """
        facts = bundle.manifest.training
        if facts is None:
            raise UsageError(
                f"{bundle.path} cannot be trained: export it again with --train-graph, or give another bundle"
            )
        return cls.load(bundle.path, facts, threads=threads)

    @classmethod
    def load(cls, folder: Path, facts: TrainingGraph, *, threads: int = 1) -> Self:
        """Returns the step in the folder of a bundle."""
        parameters = load_unchecked(folder / PARAMETERS, "parameters")
        if facts.bases:
            parameters |= load_unchecked(folder / BASES, "bases")
        return cls(folder / STEP, folder / EVALUATE, facts, parameters, threads=threads)

    def step(
        self,
        images: NDArray[np.float32],
        targets: NDArray[np.int64] | NDArray[np.float32],
        *,
        lr: float,
        weight_decay: float = 0.0,
        clip_norm: float = float("inf"),
        last: bool = True,
    ) -> StepResult:
        """Takes one step on images [B, C, H, W] and targets [B], or [B, classes] where the loss takes such.

        Args:
            images: as the model takes them.
            targets: of them.
            lr: learning rate.
            weight_decay: of the step.
            clip_norm: largest norm of the gradient.
            last: whether these are the last images of the update; it is of all since the one before.

        Raises:
            UsageError: they are not the last, and the step was not exported for that.
            ModelFailedError: the graph cannot take them, or fails; then the update begins anew.
        """
        if not last and self._update is None:
            raise UsageError(
                "this training step makes an update of every batch: export it again with "
                "adapt.accumulate = true"
            )
        data = {self._images: images, "targets": targets}
        scalars = {
            name: np.array(value, np.float32)
            for name, value in (("lr", lr), ("weight_decay", weight_decay), ("clip_norm", clip_norm))
        }
        try:
            if self._update is None:
                found = self._step.run(data | scalars)
            else:
                found = self._step.run(data)
                self._is_part_done = True
                if last:
                    found |= self._update.run(scalars)
                    self._clear_sums()
        except Exception as error:  # the classes of onnxruntime have no base of their own
            self._clear_sums()
            raise ModelFailedError(
                f"the training step failed on images {list(images.shape)}: {one_line(str(error))}"
            ) from error
        return StepResult(found["loss"], int(found["correct"]), found.get("gradient_norm"))

    def outputs(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the outputs [B, classes] of the model as it is now, for images [B, C, H, W].

        Raises:
            ModelFailedError: the graph cannot take them, or fails.
        """
        if self._evaluate is None:
            self._evaluate = open_model(
                self._evaluate_path, step_options(threads=self.threads, optimise=True)
            )
        binding = self._evaluate.io_binding()
        for name in self.facts.parameters:
            binding.bind_ortvalue_input(name, self._state[name])
        try:
            binding.bind_cpu_input(self._evaluate.get_inputs()[0].name, np.ascontiguousarray(images))
            binding.bind_output(self._evaluate.get_outputs()[0].name)
            self._evaluate.run_with_iobinding(binding)
        except Exception as error:
            raise ModelFailedError(
                f"the model failed on images {list(images.shape)}: {one_line(str(error))}"
            ) from error
        found: NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return found

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Returns copies of the parameters and the optimiser's state, by name.

        Between the parts of an update these are with the sums; else those are zeros, and left out.
        """
        left_out = () if self._is_part_done else self.facts.sums
        return {name: value.numpy().copy() for name, value in self._state.items() if name not in left_out}

    def load_tensors(self, tensors: Tensors) -> None:
        """Takes over the values of tensors, of all or of some names, in place; sums without one are zeros.

        Raises:
            IntegrityError: a name or a shape is not of this step; then nothing is changed.
        """
        unknown = sorted(tensors.keys() - self._state.keys())
        wrong = [
            f"{name} {list(tensor.shape)} against {self._state[name].shape()}"
            for name, tensor in tensors.items()
            if name in self._state and list(tensor.shape) != self._state[name].shape()
        ]
        if problems := unknown + wrong:
            raise IntegrityError(f"the state does not fit the training step: {', '.join(problems[:3])}")
        self._clear_sums()
        for name, tensor in tensors.items():
            self._state[name].update_inplace(np.asarray(tensor, np.float32, order="C"))
        self._is_part_done = any(name in tensors for name in self.facts.sums)

    def _clear_sums(self) -> None:
        for name in self.facts.sums:
            self._state[name].update_inplace(np.zeros(self._state[name].shape(), np.float32))
        self._is_part_done = False


def step_options(*, threads: int, optimise: bool = False) -> ort.SessionOptions:
    """Returns how a training step is run: as it is written.

    A runtime that optimises finds what is to be computed again to be there already, and keeps it.

    Args:
        threads: of onnxruntime.
        optimise: for the forward pass alone, where nothing is computed twice.
    """
    options = session_options(threads=threads, optimise=optimise)
    options.enable_mem_pattern = False  # it would hold what the largest batch so far took
    return options


def _buffer(state: Tensors, name: str, shape: Sequence[int]) -> ort.OrtValue:
    tensor = state.get(name)
    if tensor is None or list(tensor.shape) != list(shape):
        found = "none" if tensor is None else list(tensor.shape)
        raise IntegrityError(f"the training step needs {name} {list(shape)}, its state has {found}")
    # A copy: the tensors of a file are views of it, and the step writes into its buffers.
    return ort.OrtValue.ortvalue_from_numpy(np.array(tensor, np.float32))


def _zeros(shape: Sequence[int]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
