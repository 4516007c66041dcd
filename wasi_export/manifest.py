"""What a bundle says of itself: the names of its files, and `manifest.json` as frozen pydantic models.

How a bundle is opened and checked against this is `artifact.py`.
"""

import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from wasi_export.config import AdaptConfig, NumberForm, TrainMethod
from wasi_export.errors import ConfigError
from wasi_export.ranks import LayerPlan
from wasi_export.settings import Frozen
from wasi_export.untrusted.graph import MAX_BYTES

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
SIGNATURE = "bundle.sig"
MODEL = "model.onnx"
QUANTIZED_MODELS: Mapping[NumberForm, str] = {"int8": "model.int8.onnx", "fp16-storage": "model.fp16.onnx"}
GOLDEN = "golden/golden.safetensors"
STEP, UPDATE, EVALUATE = "train/step.onnx", "train/update.onnx", "train/evaluate.onnx"
PARAMETERS, REST = "train/parameters.safetensors", "train/rest.safetensors"
BASES = "train/bases.safetensors"
TRAINED_PLAN = "train/plan.json"
CONFIG = "config.toml"
NEXT = ".next"
"""Of the name of an output of the step that is the new value of an input."""

MAX_FILES = 1000
MAX_SIDE = 2**14
"""Of an image, in pixels."""

FileName = Annotated[
    str, StringConstraints(pattern=r"^(\w[\w.-]*/)*\w[\w.-]*\.(onnx|safetensors|json|toml|md)$")
]
"""Of a file of the bundle, below its folder. No other kinds of files: none is ever unpickled or run."""
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""As a package is called."""


class FileEntry(Frozen):
    """What a file of the bundle must be."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0, le=MAX_BYTES)


class InputSpec(Frozen):
    """How an image becomes the model's input; the fields are timm's data config."""

    name: str = "images"
    channels: Literal[1, 3] = 3
    height: int = Field(ge=1, le=MAX_SIDE)
    width: int = Field(ge=1, le=MAX_SIDE)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_pct: float = Field(1.0, ge=0.01, le=1)

    @model_validator(mode="after")
    def _channels_have_mean_and_std(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels or not all(
            0 < std < math.inf for std in self.std
        ):
            raise ValueError(
                f"mean and std need {self.channels} numbers, std above 0, got {self.mean}, {self.std}"
            )
        return self


class ModelFacts(Frozen):
    """Where the graph comes from."""

    name: str
    method: TrainMethod
    parameters: int
    layers: tuple[LayerPlan, ...] = ()


class Quantized(Frozen):
    """The graph in smaller numbers, or why it was left out. Measured against the fp32 graph at export."""

    form: NumberForm
    file: str | None = Field(description="None: it was not good enough")
    reason: str = Field("", description="why it was left out")
    error: float = Field(description="norm of the outputs' error over that of the outputs, on golden images")
    accuracy_drop: float = Field(description="share right in fp32 minus share right in this form")
    images: int = Field(description="that the drop was measured on")
    latency_ratio: float = Field(description="time over that of the fp32 graph, where it was exported")
    kept: tuple[str, ...] = Field((), description="weights whose products stay fp32")

    @model_validator(mode="after")
    def _file_is_of_the_bundle(self) -> Self:
        if self.file not in (None, wanted := QUANTIZED_MODELS[self.form]):
            raise ValueError(f"a graph in {self.form} is {wanted}, got {self.file!r}")
        return self

    def __str__(self) -> str:
        if self.file is None:
            return f"no {self.form}: it {self.reason}"
        kept = f", {len(self.kept)} products in fp32" if self.kept else ""
        return (
            f"{self.form}, accuracy {0 - self.accuracy_drop:+.1%} on {self.images} images, "
            f"error {self.error:.1e}, {self.latency_ratio:.2f} of the time of fp32{kept}"
        )


class TrainingGraph(Frozen):
    """The training step that a bundle has, and how a board is to run it."""

    settings: AdaptConfig
    parameters: tuple[str, ...] = Field(description="that are trained; inputs and outputs of the graph")
    optimizer: tuple[str, ...] = Field(description="state of the optimiser, the same")
    bases: tuple[str, ...] = Field((), description="of that state, what begins as stored, not as zeros")
    sums: tuple[str, ...] = Field((), description="of gradients, between the two halves of the step")
    frozen: tuple[str, ...] = Field(
        description="tensors of the checkpoint that evaluate.onnx has as they are"
    )
    model_parameters: int = Field(description="of the checkpoint, before any layer was folded")
    parity_error: float = Field(description="largest of the step, of its outputs or its loss")

    def __str__(self) -> str:
        s = self.settings
        return f"{s.trainable} by {s.opt}, {len(self.parameters)} tensors, recompute {s.recompute}"


class Merged(Frozen):
    """Where the parameters of a bundle come from that was made of others."""

    bundle: str = Field(description="sha256 of the manifest of the bundle that was trained")
    states: tuple[str, ...] = Field(description="sha256 of what was trained, one for each state")
    shares: tuple[float, ...] = Field(description="of each state in the mean")


class Manifest(Frozen):
    """All that a reader needs to know of a bundle, and the hashes that make it trustworthy."""

    schema_version: Literal[1] = 1
    name: str
    model: ModelFacts
    classes: tuple[str, ...]
    input: InputSpec
    output: str = "logits"
    opset: int
    ir_version: int
    min_onnxruntime: str = Field(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=32)
    parity_error: float = Field(description="largest error over output scale at export")
    quantized: Quantized | None = None
    training: TrainingGraph | None = None
    merged: Merged | None = None
    seed: int
    data_fingerprint: str | None = Field(description="hash of the training images and labels")
    metrics: Mapping[str, float] = Field(description="of the training run")
    tools: Mapping[ToolName, str] = Field(description="versions that made the bundle")
    created: str = Field(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$",
        description="ISO 8601, UTC; from SOURCE_DATE_EPOCH where it is set",
    )
    files: Mapping[FileName, FileEntry] = Field({}, max_length=MAX_FILES)

    @field_validator("created")
    @classmethod
    def _created_is_a_time(cls, created: str) -> str:
        datetime.fromisoformat(created)  # a ValueError names what there is not, as a month 13
        return created


def creation_time() -> str:
    """Returns the time of SOURCE_DATE_EPOCH, or else now, in ISO 8601.

    Source: https://reproducible-builds.org/specs/source-date-epoch/

    Raises:
        ConfigError: SOURCE_DATE_EPOCH is not a number of seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"SOURCE_DATE_EPOCH must be seconds since 1970, got {epoch!r}") from error
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
