"""How far the gradient of each rung of the memory ladder is from that of the plain factored step."""

import copy
from pathlib import Path
from typing import Any

import torch
from memory_rungs import RUNGS, Rung
from torch import Tensor, nn

from wasi_export.config import MemoryConfig, TrainConfig
from wasi_export.datasets import load_data
from wasi_export.errors import ConfigError
from wasi_export.subspace import subspace_layers
from wasi_export.training.checkpoint import load_run
from wasi_export.training.data import make_loader
from wasi_export.training.ladder import saving_memory
from wasi_export.training.optim import create_optimizer
from wasi_export.training.processes import make_accelerator
from wasi_export.training.step import TrainingStep


def gradient_errors(run_dir: Path) -> list[dict[str, Any]]:
    """Returns ‖g − g₀‖/‖g₀‖ over all parameters, by rung, on one training batch of a factored run.

    Both gradients are taken at the weights of the run. Rungs that differ in the optimiser alone are left out.

    Raises:
        ConfigError: the run is not factored.
    """
    run = load_run(run_dir)
    if run.plan is None:
        raise ConfigError(f"{run_dir} is a dense run: give a factored one")
    train, _ = load_data(run.config.data)
    loader = make_loader(
        train.take(range(run.config.data.batch_size)), run.facts.input, run.config.data, training=False
    )
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    rungs = [rung for rung in RUNGS if rung.factored and (rung.update, rung.opt) == ("factors", "adamw")]
    gradients = {rung.name: take_gradient(run.model, rung, images, labels) for rung in rungs}
    exact = gradients["factors"]
    norm = sum(g.square().sum() for g in exact.values()).sqrt()
    return [
        {
            "rung": name,
            "error": float(sum((g - exact[key]).square().sum() for key, g in found.items()).sqrt() / norm),
            "batch": len(images),
            "model": run.config.model.name,
        }
        for name, found in gradients.items()
    ]


def take_gradient(model: nn.Module, rung: Rung, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of one step of a rung by parameter, in fp64; leaves the model as it is."""
    model = copy.deepcopy(model).train()
    if not rung.compressed:
        for _, layer in subspace_layers(model):
            layer.feature_basis = layer.token_basis = None
    gradients: dict[str, Tensor] = {}

    def keep(name: str, parameter: nn.Parameter) -> None:
        def hook(_: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = parameter.grad.double()  # of several parts of the batch the last has the sum

        parameter.register_post_accumulate_grad_hook(hook)

    for name, parameter in model.named_parameters():
        keep(name, parameter)
    config = TrainConfig(memory=MemoryConfig.model_validate(rung.memory), clip_grad=None)
    optimizer = create_optimizer(model, config)
    with saving_memory(model, optimizer, config):
        TrainingStep(make_accelerator(), model, optimizer, config, seed=0)(images, labels, 0)
    return gradients
