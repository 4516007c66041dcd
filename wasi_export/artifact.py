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
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wasi_export.config import Config, DataConfig
from wasi_export.durable import file_sha256, fingerprint, write_bytes
from wasi_export.errors import IntegrityError, MalformedError
from wasi_export.manifest import (
    CONFIG,
    GOLDEN,
    MANIFEST,
    MANIFEST_DIGEST,
    MODEL,
    SIGNATURE,
    FileEntry,
    InputSpec,
    Manifest,
)
from wasi_export.untrusted.document import parse_document, read_some
from wasi_export.untrusted.graph import GraphFacts, check_graph
from wasi_export.untrusted.tensors import check_tensors, load_unchecked

_REPAIR = "export it again or copy it again"


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

    @property
    def trained_on(self) -> tuple[DataConfig, str] | None:
        """How the training images were chosen and their fingerprint; None of a model that was not trained.

        Raises:
            ConfigError: the configuration is of another version.
        """
        digest = self.manifest.data_fingerprint
        if digest is None or CONFIG not in self.manifest.files:
            return None
        return Config.from_toml(self.path / CONFIG).data, digest

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
        tensors = load_unchecked(self.path / GOLDEN, "golden data")
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
