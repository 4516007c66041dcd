"""The folder of a finished run: `train` and `merge --to torch` write it, `export` and `train --init` read it.

run/ run.json                what was trained, on what, how well; written last, so a run with it is whole
     model.safetensors       the weights
     config.toml             the whole configuration
     plan.json               the factored layers, of a subspace run
     metrics.jsonl           one line an epoch
     optimizer.safetensors   of a run that comes from a board: the state its optimiser had
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from wasi_export.config import Config, TrainMethod
from wasi_export.durable import file_sha256
from wasi_export.image_set import ImageSet
from wasi_export.manifest import InputSpec
from wasi_export.settings import Frozen

FACTS, WEIGHTS, PLAN = "run.json", "model.safetensors", "plan.json"
OPTIMIZER = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What an optimiser's state has of a parameter, as `blocks.0.norm1.weight.exp_avg`; the names are torch's."""
STEPS = "optimizer.steps"
"""Number of steps that Adam's moments are of."""


class RunFacts(Frozen):
    """What a finished run is."""

    schema_version: Literal[1] = 1
    name: str
    method: TrainMethod
    classes: tuple[str, ...]
    input: InputSpec
    seed: int
    parameters: int
    metrics: Mapping[str, float] = Field(description="val_accuracy and val_loss at the end, and what it took")
    data_fingerprint: str | None = Field(description="of the training images and labels")
    key: str = Field(description="hash of all that the weights follow from")
    weights_sha256: str


def shared_inputs(config: Config, train: ImageSet, val: ImageSet) -> tuple[Any, ...]:
    """Returns what the weights of a run follow from, but for how it is trained; for `durable.fingerprint`."""
    return (
        config.seed,
        config.model,
        _sha256(config.model.checkpoint),
        config.data.model_copy(update={"workers": 0}),
        train.fingerprint,
        val.fingerprint,
    )


def subspace_inputs(config: Config) -> tuple[Any, ...]:
    """Returns what the factors of a run follow from beside its weights; for `durable.fingerprint`."""
    return config.subspace, _sha256(config.subspace.plan)


def _sha256(path: Path | None) -> str | None:
    return file_sha256(path) if path is not None and path.is_file() else None
