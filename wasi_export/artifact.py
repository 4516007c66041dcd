"""The bundle that goes to the board.

    bundle/ manifest.json      sha256 and size of every other file, and all a reader needs to know
            manifest.sha256    of manifest.json, as `sha256sum` writes and checks it
            model.onnx         inference graph, factors explicit, dynamic batch
            model.int8.onnx    or model.fp16.onnx: the same in smaller numbers, where asked for
            golden/golden.safetensors   inputs, reference outputs, labels: a board checks itself with them
            train/step.onnx    a training step, and beside it, all by the names of the checkpoint:
                  evaluate.onnx           the model with what is trained as inputs, before any pass
                  parameters.safetensors  what is trained
                  rest.safetensors        what is in neither of them
                  bases.safetensors       in which inputs are kept, where they are
                  update.onnx             the second half of the step, where it has two
                  plan.json               the factored layers, before any was folded
            config.toml plan.json

Nothing here is ever unpickled, and no file of a bundle is opened before its hash is right.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from wasi_export.config import AdaptConfig, Frozen, NumberForm, TrainMethod
from wasi_export.durable import file_sha256, fingerprint, write_bytes
from wasi_export.errors import ConfigError, IntegrityError
from wasi_export.ranks import LayerPlan

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
MODEL = "model.onnx"
QUANTIZED_MODELS: Mapping[NumberForm, str] = {"int8": "model.int8.onnx", "fp16-storage": "model.fp16.onnx"}
GOLDEN = "golden/golden.safetensors"
STEP, UPDATE, EVALUATE = "train/step.onnx", "train/update.onnx", "train/evaluate.onnx"
PARAMETERS, REST = "train/parameters.safetensors", "train/rest.safetensors"
BASES = "train/bases.safetensors"
TRAINED_PLAN = "train/plan.json"
NEXT = ".next"
"""Of the name of an output of the step that is the new value of an input."""

_REPAIR = "export it again or copy it again"


class FileEntry(Frozen):
    """What a file of the bundle must be."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class InputSpec(Frozen):
    """How an image becomes the model's input; the fields are timm's data config."""

    name: str = "images"
    channels: Literal[1, 3] = 3
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_pct: float = Field(1.0, gt=0, le=1)


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
    accuracy_drop: float = Field(description="share of the images that are right in fp32 and lost")
    images: int = Field(description="that the drop was measured on")
    latency_ratio: float = Field(description="time over that of the fp32 graph, where it was exported")
    kept: tuple[str, ...] = Field((), description="weights whose products stay fp32")

    def __str__(self) -> str:
        if self.file is None:
            return f"no {self.form}: it {self.reason}"
        kept = f", {len(self.kept)} products in fp32" if self.kept else ""
        return (
            f"{self.form}, {self.accuracy_drop:+.1%} of {self.images} images lost, error {self.error:.1e}, "
            f"{self.latency_ratio:.2f} of the time of fp32{kept}"
        )


class TrainingGraph(Frozen):
    """The training step that a bundle has, and how a board is to run it."""

    settings: AdaptConfig
    parameters: tuple[str, ...] = Field(description="that are trained; inputs and outputs of the graph")
    optimizer: tuple[str, ...] = Field(description="state of the optimiser, the same")
    bases: tuple[str, ...] = Field((), description="of that state, what begins as stored, not as zeros")
    sums: tuple[str, ...] = Field((), description="of gradients, between the two halves of the step")
    optimise: bool = Field(
        False, description="whether the runtime may rewrite the graph; then it keeps what is to be recomputed"
    )
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
    min_onnxruntime: str
    parity_error: float = Field(description="largest error over output scale at export")
    quantized: Quantized | None = None
    training: TrainingGraph | None = None
    merged: Merged | None = None
    seed: int
    data_fingerprint: str | None = Field(description="hash of the training images and labels")
    metrics: Mapping[str, float] = Field(description="of the training run")
    tools: Mapping[str, str] = Field(description="versions that made the bundle")
    created: str = Field(description="ISO 8601, UTC; from SOURCE_DATE_EPOCH where it is set")
    files: Mapping[str, FileEntry] = {}


@dataclass(frozen=True)
class Golden:
    """Inputs [N, C, H, W], reference outputs [N, classes] of the torch model, labels [N]."""

    images: NDArray[np.float32]
    outputs: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file was found to be what the manifest says."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The inference graph."""
        return self.path / MODEL

    @property
    def quantized_path(self) -> Path | None:
        """The same graph in smaller numbers, where there is one."""
        quantized = self.manifest.quantized
        return None if quantized is None or quantized.file is None else self.path / quantized.file

    @property
    def training_identity(self) -> str:
        """Hash of the training step and of what it begins with: a state goes with this one."""
        files = self.manifest.files
        return fingerprint(*(files[name].sha256 for name in sorted(files) if name.startswith("train/")))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Returns the bundle in a folder, after checking the size and sha256 of every file.

        Raises:
            IntegrityError: the folder is no bundle, or a file is missing, changed or not in the manifest.
        """
        if not path.is_dir():
            raise IntegrityError(f"no bundle at {path}: give the folder that `wasi-export export` wrote")
        manifest = _read_manifest(path)
        try:
            problems = _differences(path, manifest.files)
        except OSError as error:
            raise IntegrityError(f"bundle {path} cannot be read: {error}") from error
        if problems:
            raise IntegrityError(f"bundle {path}: {'; '.join(problems)}: {_REPAIR}")
        return cls(path, manifest)

    def copy_files(self, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Copies the files whose names in the manifest are wanted into another folder."""
        for name in filter(wanted, self.manifest.files):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.path / name, folder / name)

    def golden(self) -> Golden:
        """Returns the golden data.

        Raises:
            IntegrityError: the file is not what the library wrote.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(self.path / GOLDEN)
            return Golden(tensors["images"], tensors["outputs"], tensors["labels"])
        except (OSError, KeyError, SafetensorError) as error:
            raise IntegrityError(f"{self.path / GOLDEN} holds no golden data: {error}") from error


def write_bundle_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json and its own hash beside the finished files of a bundle, their hashes filled in."""
    files = {
        name: FileEntry(sha256=file_sha256(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in sorted(_described_files(folder))
    }
    data = manifest.model_copy(update={"files": files}).model_dump_json(indent=2).encode()
    write_bytes(folder / MANIFEST, data)
    write_bytes(folder / MANIFEST_DIGEST, _digest_line(data))


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


def _digest_line(manifest: bytes) -> bytes:
    """Returns the line that `sha256sum manifest.json` prints."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def _read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of a bundle once its own hash is right."""
    for name in (MANIFEST, MANIFEST_DIGEST):
        if not (folder / name).exists():
            raise IntegrityError(f"{folder} has no {name}: it is not a whole bundle, {_REPAIR}")
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise IntegrityError(f"{folder / name} is a link or not a plain file: {_REPAIR}")
    try:
        data = (folder / MANIFEST).read_bytes()
        if (folder / MANIFEST_DIGEST).read_bytes() != _digest_line(data):
            raise IntegrityError(f"{folder / MANIFEST} is not what {MANIFEST_DIGEST} says: {_REPAIR}")
        return Manifest.model_validate_json(data)
    except (OSError, ValidationError) as error:
        first = " ".join(str(error).splitlines()[:3])
        raise IntegrityError(f"{folder / MANIFEST} is not a manifest: {first}") from None


def _described_files(folder: Path) -> set[str]:
    """Returns all that the manifest must list: every file and link below the folder but its own two."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    return found - {MANIFEST, MANIFEST_DIGEST}


def _differences(folder: Path, expected: Mapping[str, FileEntry]) -> list[str]:
    """Returns a line for every file that is missing, linked, changed or unknown."""
    present = _described_files(folder)
    problems = [f"{name} is missing" for name in sorted(expected.keys() - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - expected.keys())]
    if MODEL not in expected:
        problems.append(f"the manifest lists no {MODEL}")
    for name in sorted(expected.keys() & present):
        file, entry = folder / name, expected[name]
        if file.is_symlink() or not file.is_file():
            problems.append(f"{name} is a link or not a plain file")
        elif (size := file.stat().st_size) != entry.size_bytes:
            problems.append(f"{name} has {size} bytes, the manifest says {entry.size_bytes}")
        elif (digest := file_sha256(file)) != entry.sha256:
            problems.append(f"{name} has sha256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…")
    return problems
