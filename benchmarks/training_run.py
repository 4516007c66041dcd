"""One run of a row of `benchmarks/training.py`: real weights, real images, to a figure of accuracy."""

from pathlib import Path
from typing import Any

from torch import nn
from training_adapters import adapt, merge_lora
from training_levers import train_lever
from training_rows import Row, config_of

from wasi_export.cli._console import track
from wasi_export.config import Config
from wasi_export.datasets import load_data
from wasi_export.image_set import ImageSet
from wasi_export.ranks import Plan
from wasi_export.subspace.inject import factor_layers
from wasi_export.subspace.planner import MeasuredModel, decide
from wasi_export.subspace.tucker import Bases
from wasi_export.training.beginning import first_model
from wasi_export.training.checkpoint import load_run
from wasi_export.training.data import make_loader
from wasi_export.training.loop import evaluate, fit
from wasi_export.training.models import input_spec
from wasi_export.training.planning import measure_model
from wasi_export.training.stage import train_run


def train_row(row: Row, checkpoint: Path, run_dir: Path, *, model: str, seed: int) -> dict[str, Any]:
    """Returns what a run came to; one of the pipeline's goes on where `run_dir` left it."""
    config = config_of(row, checkpoint, model=model, seed=seed)
    if row.adapters:
        return _train_adapters(row, config)
    if row.lever is not None:
        trained, loss = train_lever(row.lever, config, run_dir.parent)
        return {**_judge(trained, config), "train_loss": loss}
    facts = train_run(config, row.method, run_dir, replace=True, track=track)
    return {
        **_judge(load_run(run_dir).model, config),
        "train_loss": facts.metrics["train_loss"],
        "cpu_seconds": facts.metrics["cpu_seconds"],
    }


def _train_adapters(row: Row, config: Config) -> dict[str, Any]:
    """Trains the models of another method one after the other, each for an equal part of the epochs."""
    train, val = load_data(config.data)
    model = first_model(config, train.classes)
    spec, settings = input_spec(model, config), getattr(config.train, row.method)
    plan, measured = _plan(row, config, model, train)
    if row.factored:
        factor_layers(model, measured, plan)
    cpu_seconds = 0.0
    share = settings.epochs // len(row.adapters)
    for index, adapter in enumerate(row.adapters):
        adapt(model, adapter, plan, lora_rank=row.lora_rank, starts=_starts(measured))
        loader = make_loader(train, spec, config.data, training=True, seed=config.seed)
        val_loader = make_loader(val, spec, config.data, training=False)
        epochs = range(index * share, (index + 1) * share)
        history = fit(model, loader, val_loader, settings, None, seed=config.seed, epochs=epochs, track=track)
        cpu_seconds += sum(metrics.cpu_seconds for metrics in history)
    if row.lora_rank:
        merge_lora(model)
    return {**_judge(model, config), "train_loss": history[-1].train_loss, "cpu_seconds": cpu_seconds}


def _judge(model: nn.Module, config: Config) -> dict[str, Any]:
    """Returns the number of parameters, and accuracy and loss on all test images."""
    _, test = load_data(config.data.model_copy(update={"val_images": None}))
    found = evaluate(model, make_loader(test, input_spec(model, config), config.data, training=False))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": found.accuracy,
        "loss": found.loss,
    }


def _plan(row: Row, config: Config, model: nn.Module, train: ImageSet) -> tuple[Plan, MeasuredModel]:
    """Returns which layers a method acts on; for one without `subspace` the ranks mean nothing."""
    if row.subspace is None:
        plain = {"method": "plain", "sensitivity": "none", "activation": "none", "fraction": 0.4}
        config = config.model_copy(update={"subspace": config.subspace.model_copy(update=plain)})
    measured = measure_model(config, model, train, track=track)
    return decide(measured, config.subspace), measured


def _starts(measured: MeasuredModel) -> dict[str, Bases]:
    return {layer.spectrum.name: Bases(layer.feature_axes, layer.token_axes) for layer in measured.layers}
