"""An ONNX model in onnxruntime on the CPU: threads are stated, and errors say what to do."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from wasi_export.errors import HostError, ModelFailedError, UsageError

# What onnxruntime says of a model that is newer than itself: IR version, opset, then the two ways in which it
# misses a single operator (no schema; a schema but no kernel).
_NEWER_IR = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_NEWER_OPSET = re.compile(r"Opset (\d+) is under development.*till opset (\d+)", re.DOTALL)
_UNKNOWN_OPERATOR = re.compile(
    r"No Op registered for (\w+) with domain_version of (\d+)"
    r"|Could not find an implementation for (\w+)\((\d+)\)"
)


@dataclass(frozen=True)
class Session:
    """A loaded model with one image input [B, C, H, W] and its first output [B, classes]."""

    path: Path
    input_name: str
    input_shape: tuple[int | None, ...]
    """Axes of the input; None: any size."""
    _ort: ort.InferenceSession

    @classmethod
    def open(
        cls, path: Path, *, threads: int = 1, optimise: bool = True, profile: Path | None = None
    ) -> Self:
        """Returns the loaded model, with all graph optimisations of onnxruntime or with none.

        With `profile`, the beginning of a file name, the runtime's profiler runs until `end_profile`.

        Raises:
            UsageError: there is no such file.
            HostError: the model needs a newer onnxruntime.
            ModelFailedError: the model does not load, or does not have one input of four axes.
        """
        options = session_options(threads=threads, optimise=optimise)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        session = open_model(path, options)
        inputs = session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            got = ", ".join(f"{i.name} {i.shape}" for i in inputs)
            raise ModelFailedError(f"{path} must have one input of shape [B, C, H, W], got {got or 'none'}")
        shape = tuple(axis if isinstance(axis, int) else None for axis in inputs[0].shape)
        return cls(path, inputs[0].name, shape, session)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the first output, [B, classes], for images [B, C, H, W].

        Raises:
            ModelFailedError: the model cannot take these images, or fails.
        """
        try:
            (output,) = self._ort.run([self._ort.get_outputs()[0].name], {self.input_name: images})
        except Exception as error:
            raise ModelFailedError(
                f"{self.path} failed on images {list(images.shape)}: {one_line(str(error))}"
            ) from error
        logits: NDArray[np.float32] = output
        return logits

    def end_profile(self) -> Path:
        """Returns the file of events that the profiler wrote; it stops."""
        return Path(self._ort.end_profiling())

    def random_images(self, batch: int) -> NDArray[np.float32]:
        """Returns standard normal images [batch, C, H, W] that fit the input, the same ones every time.

        Raises:
            UsageError: the model has no fixed image size, or a fixed batch size that is another.
        """
        fixed_batch, *image = self.input_shape
        if fixed_batch not in (None, batch):
            raise UsageError(f"{self.path} takes batch {fixed_batch} only, got batch {batch}: ask for that")
        if None in image:
            raise UsageError(f"{self.path} has no fixed image size, its input is {list(self.input_shape)}")
        shape = (batch, *(axis for axis in image if axis is not None))
        return np.random.default_rng(0).standard_normal(shape, np.float32)


def open_model(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """Returns a model loaded on the CPU.

    Raises:
        UsageError: there is no such file.
        HostError: the model needs a newer onnxruntime.
        ModelFailedError: the model does not load.
    """
    if not path.is_file():
        raise UsageError(f"no model file {path}: check the path")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the classes of onnxruntime have no base of their own
        raise _load_error(path, str(error)) from error


def session_options(*, threads: int, optimise: bool = True) -> ort.SessionOptions:
    """Returns how every model is run: one after another operator, on so many threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4  # fatal: its errors come as exceptions, and would be told twice
    return options


def _load_error(path: Path, message: str) -> HostError | ModelFailedError:
    installed = f"onnxruntime {ort.__version__}"
    remedy = "install a newer onnxruntime"
    if newer := _NEWER_IR.search(message):
        return HostError(
            f"{path} has IR version {newer[1]}, {installed} on this machine knows up to {newer[2]}: {remedy}"
        )
    if newer := _NEWER_OPSET.search(message):
        return HostError(
            f"{path} has opset {newer[1]}, {installed} on this machine knows up to {newer[2]}: "
            f"{remedy}, or export again with a lower opset"
        )
    if unknown := _UNKNOWN_OPERATOR.search(message):
        return HostError(
            f"{path} needs operator {unknown[1] or unknown[3]} of opset {unknown[2] or unknown[4]}, which "
            f"{installed} on this machine does not have: {remedy}, or export again with a lower opset"
        )
    return ModelFailedError(f"{path} does not load in {installed}: {one_line(message)}")


def one_line(message: str) -> str:
    """Returns a message of onnxruntime without its prefix, on one line."""
    return " ".join(re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message).split())
