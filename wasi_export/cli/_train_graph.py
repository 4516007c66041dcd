"""The training step of a bundle: its graphs, its parameters, and what the manifest says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from wasi_export.artifact import Bundle, Golden, write_bundle_manifest
from wasi_export.config import AdaptConfig, Config
from wasi_export.converters.inference import write_source
from wasi_export.converters.merge import frozen_tensors, with_inputs
from wasi_export.converters.step_graph.first_bases import first_bases
from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.rates import parameter_rates
from wasi_export.converters.step_graph.trainable import trainable_names
from wasi_export.converters.training_step import ExportedStep, export_training_step
from wasi_export.durable import staged_folder, write_bytes
from wasi_export.errors import ConfigError, ParityError
from wasi_export.manifest import (
    BASES,
    CONFIG,
    EVALUATE,
    PARAMETERS,
    REST,
    STEP,
    TRAINED_PLAN,
    UPDATE,
    InputSpec,
    TrainingGraph,
)
from wasi_export.runtimes.step_parity import require_step_parity
from wasi_export.runtimes.training_session import TrainingSession
from wasi_export.subspace.inject import fold_layers
from wasi_export.training.checkpoint import load_run

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch import nn


@dataclass(frozen=True)
class TrainedParts:
    """The training step of a model, and all tensors that the model had when it was made."""

    exported: ExportedStep
    config: AdaptConfig
    tensors: Mapping[str, NDArray[Any]]
    parameters: int
    """Their number."""


def make_training_step(
    model: "nn.Module", spec: InputSpec, config: AdaptConfig, images: NDArray[np.float32]
) -> TrainedParts:
    """Returns the training step of a model.

    Args:
        model: as it was trained.
        spec: of its input.
        config: of the step.
        images: real ones, [B, C, H, W], for the first bases of what is kept compressed.

    Raises:
        ConfigError: the model has no such parameters or blocks.
        UnsupportedModelError: there is no form for an operator of the step.
    """
    trainable = trainable_names(model, config.trainable)
    head = 1.0 if config.head_lr is None else config.head_lr / config.lr
    factors = None if config.factor_lr == "auto" else config.factor_lr / config.lr
    settings = StepSettings(
        opt=config.opt,
        loss=config.loss,
        smoothing=config.smoothing,
        recompute=config.recompute,
        rates=parameter_rates(model, trainable, head=head, factors=factors),
        momentum=config.momentum,
        bases=first_bases(model, trainable, images, config.activation, config.activation_epsilon),
        wsi=config.update == "wsi",
        accumulate=config.accumulate,
    )
    exported = export_training_step(model, spec, trainable, settings)
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    return TrainedParts(exported, config, tensors, count)


def write_training_step(
    parts: TrainedParts, source: "ir.Model", golden: Golden, folder: Path, *, name: str, tolerance: float
) -> tuple[TrainingGraph, "onnx.ModelProto"]:
    """Writes the training step into the folder of a bundle; returns the manifest's part, and evaluate.onnx.

    Args:
        parts: of `make_training_step`.
        source: the inference graph before any pass; layers may have been folded since the step was made.
        golden: whose outputs the step must give.
        folder: of the bundle.
        name: of the inference graph.
        tolerance: largest error, of the output scale.

    Raises:
        UnsupportedModelError: what is trained has no place of its own in the inference graph.
        ParityError: the step differs from the model.
    """
    step = parts.exported
    evaluate = with_inputs(source, step.parameters, parts.tensors, name)
    found = frozen_tensors(evaluate)
    others = parts.tensors.keys() - step.parameters.keys()
    frozen = {key for key in others & found.keys() if np.array_equal(found[key], parts.tensors[key])}
    rest = {key: parts.tensors[key] for key in sorted(others - frozen)}
    write_bytes(folder / STEP, step.step.SerializeToString(deterministic=True))
    write_bytes(folder / EVALUATE, evaluate.SerializeToString(deterministic=True))
    if step.update is not None:
        write_bytes(folder / UPDATE, step.update.SerializeToString(deterministic=True))
    if step.bases:
        write_bytes(folder / BASES, save({key: step.optimizer[key] for key in step.bases}))
    write_bytes(folder / PARAMETERS, save(step.parameters))
    write_bytes(folder / REST, save(rest))
    facts = TrainingGraph(
        settings=parts.config,
        parameters=tuple(step.parameters),
        optimizer=tuple(step.optimizer),
        bases=step.bases,
        sums=step.sums,
        frozen=tuple(sorted(frozen)),
        model_parameters=parts.parameters,
        parity_error=0.0,
    )
    error = require_step_parity(TrainingSession.load(folder, facts), golden, tolerance)
    return facts.model_copy(update={"parity_error": error}), evaluate


def add_training_step(path: Path, run_dir: Path, overrides: Sequence[str]) -> TrainingGraph:
    """Adds the training step of a run to the bundle that it was exported into; returns the manifest's part.

    Args:
        path: of the bundle, which is replaced once the new one is whole.
        run_dir: of the run.
        overrides: of the configuration, as `adapt.trainable=head`.

    Raises:
        IntegrityError: a file of the bundle or the run is not what was written.
        ConfigError: the model has no such parameters or blocks, or the bundle's graph normalises images.
        UnsupportedModelError: there is no form for an operator of the step.
        ParityError: the bundle is not of that run.
    """
    bundle, run = Bundle.open(path), load_run(run_dir)
    manifest, golden = bundle.manifest, bundle.golden()
    config = Config.from_mapping(Config.from_toml(path / CONFIG).model_dump(), overrides, origin="options")
    if config.export.fold_normalization:
        raise ConfigError(
            f"{path} was exported with fold_normalization, which changes a weight that the training step has "
            "as it is: export it again without"
        )
    parts = make_training_step(run.model, manifest.input, config.on_board, golden.images)
    kept = {layer.name for layer in manifest.model.layers if layer.rank is not None}
    factored = [layer.name for layer in run.plan.factored] if run.plan is not None else []
    fold_layers(run.model, (name for name in factored if name not in kept))
    source = write_source(run.model, manifest.input, opset=manifest.opset)
    tolerance = config.thresholds.max_parity_error
    with staged_folder(path, force=True) as folder:
        bundle.copy_files(folder, lambda name: not name.startswith("train/"))
        write_bytes(folder / CONFIG, config.to_toml().encode())
        if run.plan is not None:
            write_bytes(folder / TRAINED_PLAN, run.plan.model_dump_json(indent=2).encode())
        try:
            training, _ = write_training_step(
                parts, source, golden, folder, name=manifest.name, tolerance=tolerance
            )
        except ParityError as error:
            raise ParityError(f"{path} was not exported from {run_dir}: {error}") from error
        write_bundle_manifest(folder, manifest.model_copy(update={"training": training}))
    return training
