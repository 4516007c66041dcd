"""The bundle that goes to the board.

    bundle/ manifest.json      sha256 and size of every other file, and all a reader needs to know
            manifest.sha256    of manifest.json, as `sha256sum` writes and checks it
            bundle.sig         where it was signed, a signature of all the others (`signing.py`)
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

Nothing here is ever unpickled, and no file of a bundle is opened before its hash is right. A right hash says
nothing of who wrote the bundle, so what is in the graphs and tensors is looked at as well (`untrusted/`).
"""

import hashlib
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator

from wasi_export.config import AdaptConfig, Frozen, NumberForm, TrainMethod
from wasi_export.durable import file_sha256, fingerprint, write_bytes
from wasi_export.errors import ConfigError, IntegrityError, MalformedError
from wasi_export.ranks import LayerPlan
from wasi_export.untrusted.document import parse_document, read_some
from wasi_export.untrusted.graph import MAX_BYTES, GraphFacts, check_graph
from wasi_export.untrusted.tensors import check_tensors

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
NEXT = ".next"
"""Of the name of an output of the step that is the new value of an input."""

MAX_FILES = 1000
MAX_SIDE = 2**14
"""Of an image, in pixels."""
_REPAIR = "export it again or copy it again"


FileName = Annotated[
    str, StringConstraints(pattern=r"^(\w[\w.-]*/)*\w[\w.-]*\.(onnx|safetensors|json|toml|md)$")
]
"""Of a file of the bundle, below its folder. No other kinds of files: none is ever unpickled or run."""


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
    accuracy_drop: float = Field(description="share of the images that are right in fp32 and lost")
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
    files: Mapping[FileName, FileEntry] = Field({}, max_length=MAX_FILES)


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
        """Returns the bundle in a folder, after checking the size, the sha256 and the contents of every file.

        Raises:
            IntegrityError: the folder is no bundle, or a file is missing, changed, not in the manifest, or
                holds what no bundle may hold.
        """
        if not path.is_dir():
            raise IntegrityError(f"no bundle at {path}: give the folder that `wasi-export export` wrote")
        manifest = _read_manifest(path)
        try:
            problems = _differences(path, manifest) or list(_harm(path, manifest))
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
            IntegrityError: the file holds something else, or data of another model.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(self.path / GOLDEN)
        except (OSError, SafetensorError) as error:
            raise IntegrityError(f"{self.path / GOLDEN} holds no golden data: {error}") from error
        spec, classes = self.manifest.input, len(self.manifest.classes)
        count = len(tensors["labels"]) if "labels" in tensors and tensors["labels"].ndim else 0
        expected = {
            "images": (np.dtype(np.float32), (count, spec.channels, spec.height, spec.width)),
            "outputs": (np.dtype(np.float32), (count, classes)),
            "labels": (np.dtype(np.int64), (count,)),
        }
        if {name: (value.dtype, value.shape) for name, value in tensors.items()} != expected:
            found = {name: f"{value.dtype} {list(value.shape)}" for name, value in tensors.items()}
            raise IntegrityError(f"{self.path / GOLDEN} holds no golden data of this model but {found}")
        return Golden(**tensors)


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
        if not _is_own_file(folder / name):
            raise IntegrityError(f"{folder / name} is a link or not a plain file: {_REPAIR}")
    try:
        data, digest = (read_some(folder / name) for name in (MANIFEST, MANIFEST_DIGEST))
        if digest != _digest_line(data):
            raise IntegrityError(f"{folder / MANIFEST} is not what {MANIFEST_DIGEST} says: {_REPAIR}")
        return parse_document(data, Manifest)
    except (OSError, MalformedError) as error:
        raise IntegrityError(f"{folder / MANIFEST} is not a manifest: {error}") from None


def _described_files(folder: Path) -> set[str]:
    """Returns all that the manifest must list: every file and link below the folder but its own ones."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    return found - {MANIFEST, MANIFEST_DIGEST, SIGNATURE}


def _differences(folder: Path, manifest: Manifest) -> list[str]:
    """Returns a line for every file that is missing, linked, changed or unknown."""
    present, expected = _described_files(folder), manifest.files
    problems = [f"{name} is missing" for name in sorted(expected.keys() - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - expected.keys())]
    needed = {MODEL, manifest.quantized.file if manifest.quantized else None} - {None}
    problems += [f"the manifest lists no {name}" for name in needed - expected.keys()]
    if os.path.lexists(folder / SIGNATURE) and not _is_own_file(folder / SIGNATURE):
        problems.append(f"{SIGNATURE} is a link or not a plain file")
    for name in sorted(expected.keys() & present):
        file, entry = folder / name, expected[name]
        if not _is_own_file(file):
            problems.append(f"{name} is a link or not a plain file")
        elif (size := file.stat().st_size) != entry.size_bytes:
            problems.append(f"{name} has {size} bytes, the manifest says {entry.size_bytes}")
        elif (digest := file_sha256(file)) != entry.sha256:
            problems.append(f"{name} has sha256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…")
    return problems


def _is_own_file(path: Path) -> bool:
    """Returns whether it is a plain file with this one name: what has another can be changed from there."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _harm(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yields a line for every file that has its hash, but not what a bundle may hold."""
    spec = manifest.input
    for name in manifest.files:
        try:
            if name.endswith(".safetensors"):
                check_tensors(folder / name)
            elif name.endswith(".onnx"):
                facts = check_graph(folder / name)
                if "/" not in name:
                    _require_io(facts, spec, manifest.output, len(manifest.classes))
        except MalformedError as error:
            yield f"{name} is not safe to open: {error}"


def _require_io(facts: GraphFacts, spec: InputSpec, output: str, classes: int) -> None:
    """Lets the graphs of the model pass that take and give what the manifest says.

    Raises:
        MalformedError: it has another input or output.
    """
    wanted = ({spec.name: (spec.channels, spec.height, spec.width)}, {output: (classes,)})
    for kind, found, expected in zip(("input", "output"), (facts.inputs, facts.outputs), wanted, strict=True):
        if {name: shape[1:] for name, shape in found.items()} != expected:
            raise MalformedError(
                f"it has the {kind} {found}, the manifest says {expected} after the batch axis"
            )
