"""States that boards came back with, put into a new bundle or a run. No torch."""

import hashlib
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from wasi_export.artifact import Bundle, Golden, write_bundle_manifest
from wasi_export.cli._quantize import Source, add_quantized
from wasi_export.config import Config
from wasi_export.converters.check import check_factors
from wasi_export.converters.merge import frozen_tensors, read_evaluate, with_values
from wasi_export.datasets import load_labelled
from wasi_export.durable import file_sha256, fingerprint, staged_folder, write_bytes
from wasi_export.errors import UsageError
from wasi_export.image_set import ImageSet
from wasi_export.manifest import (
    CONFIG,
    EVALUATE,
    GOLDEN,
    MANIFEST,
    MODEL,
    PARAMETERS,
    REST,
    TRAINED_PLAN,
    Merged,
    Quantized,
    TrainingGraph,
    creation_time,
)
from wasi_export.progress import Track, silent
from wasi_export.ranks import Plan
from wasi_export.run_folder import FACTS, MOMENTS, OPTIMIZER, PLAN, STEPS, WEIGHTS, RunFacts
from wasi_export.runtimes.accuracy import predict
from wasi_export.runtimes.averaging import average_weights
from wasi_export.runtimes.parity import measure_parity, require_parity, worst
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session
from wasi_export.runtimes.state_folder import read_state
from wasi_export.runtimes.step_parity import require_step_parity
from wasi_export.runtimes.training_session import TrainingSession
from wasi_export.settings import Frozen

TOOLS = ("wasi-export", "onnx", "onnxscript", "onnxruntime", "numpy")
Tensors = dict[str, NDArray[np.float32]]


class MergeResult(Frozen):
    """What came of a merge into a bundle."""

    schema_version: Literal[1] = 1
    parity_error: float
    change: float
    """Largest change of an output by what was learnt, over the output scale, on the golden images."""
    quantized: Quantized | None
    accuracy_before: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Merge:
    """The mean of the states of a bundle."""

    bundle: Bundle
    facts: TrainingGraph
    parameters: Tensors
    optimizer: Tensors | None
    """State of the optimiser, as far as torch's optimisers have the same; of several states there is none."""
    origin: Merged

    @classmethod
    def of(cls, path: Path, states: Sequence[Path], shares: Sequence[float] | None) -> Self:
        """Returns the mean of states that were trained with the bundle in a folder.

        Raises:
            IntegrityError: the bundle or a state is damaged.
            UsageError: the bundle has no training step, or the shares do not fit the states.
            ConfigError: a state was trained with another bundle.
        """
        bundle = Bundle.open(path)
        facts = bundle.manifest.training
        if facts is None:
            raise UsageError(
                f"{path} has no training step, so no state can be of it: name the one that was trained"
            )
        found = [read_state(state, bundle.training_identity) for state in states]
        shares = [1.0] * len(found) if shares is None else shares
        parameters = average_weights([{k: one[k] for k in facts.parameters} for one in found], shares)
        moments = [k for k in facts.optimizer if k == STEPS or k.rpartition(".")[2] in MOMENTS]
        optimizer = {k: found[0][k] for k in moments} if len(found) == 1 else None
        origin = Merged(
            bundle=file_sha256(path / MANIFEST),
            states=tuple(_sha256(one) for one in found),
            shares=tuple(share / sum(shares) for share in shares),
        )
        return cls(bundle, facts, parameters, optimizer, origin)

    def write_bundle(
        self, destination: Path, *, data: str | None = None, force: bool = False, track: Track = silent
    ) -> MergeResult:
        """Writes a new bundle, checked like an export: factors, parity, and the training step against it.

        Raises:
            UsageError: the bundle has a graph in smaller numbers, and there are no images to judge a new one.
            CheckFailedError: the new graph is not as planned, or differs from what was trained.
            ArtifactExistsError: the destination exists.
        """
        manifest, path = self.bundle.manifest, self.bundle.path
        images = None
        if data is not None:
            trained_on = self.bundle.trained_on
            images = load_labelled(data, manifest.classes, trained_on=trained_on, track=track)
        if (smaller := self.bundle.quantized_path) is not None and images is None:
            raise UsageError(f"{path} has {smaller.name}, and a new one has to be judged: give --data")
        old = self.bundle.golden()
        with staged_folder(destination, force=force) as folder:
            self.bundle.copy_files(folder, lambda name: name.startswith("train/") or name in (CONFIG, PLAN))
            write_bytes(folder / PARAMETERS, save(self.parameters))
            graph = with_values(read_evaluate(folder / EVALUATE), self.parameters)
            check_factors(graph, Plan(activation_mode="none", layers=manifest.model.layers))
            write_bytes(folder / MODEL, graph.SerializeToString(deterministic=True))
            session = TrainingSession.load(folder, self.facts)
            golden = Golden(old.images, session.outputs(old.images), old.labels)
            write_bytes(folder / GOLDEN, save(vars(golden)))
            config = Config.from_toml(path / CONFIG)
            tolerance = config.thresholds.max_parity_error
            parity = measure_parity(folder / MODEL, golden)
            require_parity(parity, tolerance)
            error = require_step_parity(session, golden, tolerance)
            quantized = manifest.quantized
            if quantized is not None and quantized.file is not None and images is not None:
                source = Source(graph, folder / MODEL, golden, images, manifest.input, labelled=True)
                form = "auto" if quantized.form == "int8" else quantized.form
                quantized = add_quantized(source, form, factors=config.export.int8_factors, track=track)
            result = MergeResult(
                parity_error=worst(parity).max_error,
                change=float(np.abs(golden.outputs - old.outputs).max() / np.abs(old.outputs).max()),
                quantized=quantized,
                accuracy_before=self._accuracy(self.bundle.model_path, images, track),
                accuracy=self._accuracy(folder / MODEL, images, track),
            )
            new = manifest.model_copy(
                update={
                    "parity_error": result.parity_error,
                    "quantized": quantized,
                    "training": self.facts.model_copy(update={"parity_error": error}),
                    "merged": self.origin,
                    "metrics": {},  # they were of the weights before
                    "tools": {"python": platform.python_version(), **{tool: version(tool) for tool in TOOLS}},
                    "created": creation_time(),
                }
            )
            write_bundle_manifest(folder, new)
        return result

    def write_run(self, destination: Path, *, force: bool = False) -> RunFacts:
        """Writes a run folder: the whole checkpoint, and the optimiser's state where it is of one board.

        Raises:
            ArtifactExistsError: the destination exists.
        """
        manifest, path = self.bundle.manifest, self.bundle.path
        found = frozen_tensors(read_evaluate(path / EVALUATE))
        frozen = {name: found[name] for name in self.facts.frozen}
        with staged_folder(destination, force=force) as folder:
            write_bytes(folder / WEIGHTS, save({**frozen, **load_file(path / REST), **self.parameters}))
            shutil.copyfile(path / CONFIG, folder / CONFIG)
            if (path / TRAINED_PLAN).exists():
                shutil.copyfile(path / TRAINED_PLAN, folder / PLAN)
            if self.optimizer:
                write_bytes(folder / OPTIMIZER, save(self.optimizer))
            facts = RunFacts(
                name=manifest.name,
                method=manifest.model.method,
                classes=manifest.classes,
                input=manifest.input,
                seed=manifest.seed,
                parameters=self.facts.model_parameters,
                metrics={},
                data_fingerprint=manifest.data_fingerprint,
                key=fingerprint(self.origin),
                weights_sha256=file_sha256(folder / WEIGHTS),
            )
            write_bytes(folder / FACTS, facts.model_dump_json(indent=2).encode())
        return facts

    def _accuracy(self, path: Path, images: ImageSet | None, track: Track) -> float | None:
        if images is None:
            return None
        found = predict(Session.open(path), images, Preprocess(self.bundle.manifest.input), track=track)
        return float((found == images.labels).mean())


def _sha256(tensors: Tensors) -> str:
    """Returns the hash of tensors, whatever file they are in."""
    return hashlib.sha256(save(tensors)).hexdigest()
