"""The training step of a bundle: its graphs, its parameters, and what the manifest says of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from wasi_export.artifact import EVALUATE, PARAMETERS, STEP, Golden, InputSpec, TrainingGraph, write_bytes
from wasi_export.config import AdaptConfig
from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.rates import parameter_rates
from wasi_export.converters.step_graph.trainable import trainable_names
from wasi_export.converters.training_step import export_training_step
from wasi_export.errors import ParityError
from wasi_export.runtimes.training_session import TrainingSession

if TYPE_CHECKING:
    from torch import nn


def add_training_graph(
    model: "nn.Module",
    spec: InputSpec,
    config: AdaptConfig,
    golden: Golden,
    folder: Path,
    *,
    tolerance: float,
) -> TrainingGraph:
    """Writes the training step of a model into the folder of a bundle; returns what the manifest says of it.

    Args:
        model: as it was trained.
        spec: of its input.
        config: of the step.
        golden: whose outputs the forward pass of the step must give.
        folder: of the bundle.
        tolerance: largest error, of the output scale.

    Raises:
        ConfigError: the model has no such parameters or blocks.
        UnsupportedModelError: there is no form for an operator of the step.
        ParityError: the forward pass differs from the torch model.
    """
    trainable = trainable_names(model, config.trainable)
    head = 1.0 if config.head_lr is None else config.head_lr / config.lr
    settings = StepSettings(
        opt=config.opt,
        loss=config.loss,
        smoothing=config.smoothing,
        recompute=config.recompute,
        rates=parameter_rates(model, trainable, head=head),
    )
    graphs = export_training_step(model, spec, trainable, settings)
    write_bytes(folder / STEP, graphs.step.SerializeToString(deterministic=True))
    write_bytes(folder / EVALUATE, graphs.evaluate.SerializeToString(deterministic=True))
    write_bytes(folder / PARAMETERS, save(graphs.parameters))
    facts = TrainingGraph(
        settings=config,
        parameters=tuple(graphs.parameters),
        optimizer=tuple(graphs.optimizer),
        parity_error=0.0,
    )
    session = TrainingSession.load(folder, facts)
    scale = float(np.abs(golden.outputs).max())
    error = float(np.abs(session.outputs(golden.images) - golden.outputs).max()) / scale
    if not error <= tolerance:
        raise ParityError(
            f"the forward pass of the training step differs from the model by {error:.1e} of the output "
            f"scale, the tolerance is {tolerance:g}"
        )
    return facts.model_copy(update={"parity_error": error})
