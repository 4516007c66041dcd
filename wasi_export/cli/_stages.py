"""Which stages of `wasi-export run` are done: the hash of a stage's inputs, and a file that remembers it.

    dense ─► baseline ─┐
      ├─► subspace ─► bundle ─► report
      └──────┴──────► memory ───┘

A key covers the configuration a stage reads, the key of the stage before, the images, and the versions of
what computes it. Nothing here imports torch, so that a run that is finished ends in seconds.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from wasi_export import __version__
from wasi_export._extras import require_version
from wasi_export.config import Config
from wasi_export.datasets import load_data
from wasi_export.durable import fingerprint, write_bytes
from wasi_export.errors import IntegrityError
from wasi_export.progress import Track, silent
from wasi_export.run_folder import shared_inputs, subspace_inputs

STAGES = "stages.json"


@dataclass(frozen=True)
class StageKeys:
    """The key of every stage."""

    dense: str
    subspace: str
    baseline: str
    bundle: str
    memory: str
    report: str

    @classmethod
    def of(cls, config: Config, *, track: Track = silent) -> Self:
        """Returns the keys; reads the images' names and labels, not the model.

        Raises:
            DataError: the images cannot be read.
            MissingExtraError: what trains is not installed.
            NothingToCheckError: there are none.
        """
        train, val = load_data(config.data, track=track)
        trainer, exporter = _versions("torch", "timm"), _versions("torch", "onnx", "onnxscript")
        dense = fingerprint(*shared_inputs(config, train, val), config.train.dense, trainer)
        subspace = fingerprint(dense, *subspace_inputs(config), config.train.subspace)
        exported = config.name, config.export, config.on_board, config.thresholds.max_parity_error, exporter
        baseline, bundle = fingerprint(dense, *exported), fingerprint(subspace, *exported)
        memory = fingerprint(dense, subspace)
        report = fingerprint(baseline, bundle, memory, config.thresholds, _versions("onnxruntime"))
        return cls(dense, subspace, baseline, bundle, memory, report)


class StageCache:
    """The keys with which the stages of a folder were finished."""

    def __init__(self, folder: Path) -> None:
        """Reads the stages of a folder.

        Raises:
            IntegrityError: the file is not what was written.
        """
        self._path = folder / STAGES
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else "{}"
            self._done = {str(name): str(key) for name, key in json.loads(text).items()}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{self._path} is not a list of stages ({error}): delete it") from error

    def is_done(self, name: str, key: str, outputs: Iterable[Path]) -> bool:
        """Returns whether the stage was finished with this key and its outputs are still there."""
        return self._done.get(name) == key and all(output.exists() for output in outputs)

    def begin(self, name: str) -> bool:
        """Forgets a stage before it is done again; returns whether it was finished before."""
        was_done = self._done.pop(name, None) is not None
        if was_done:
            self._write()
        return was_done

    def clear(self) -> None:
        """Forgets all stages."""
        self._done = {}
        self._write()

    def finish(self, name: str, key: str) -> None:
        """Remembers that the stage is finished with this key."""
        self._done[name] = key
        self._write()

    def _write(self) -> None:
        write_bytes(self._path, (json.dumps(self._done, indent=2) + "\n").encode())


def _versions(*packages: str) -> str:
    versions = (f"{package} {require_version(package, extra='train')}" for package in packages)
    return " ".join((f"wasi-export {__version__}", *versions))
