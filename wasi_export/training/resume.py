"""Unfinished training on disk: nothing is lost, nothing is half-written.

One file holds everything, so that it is whole or not there: tensors as safetensors, the rest as JSON in
the header. Random generators need no state: what is random follows from the seed and the position.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from wasi_export.durable import write_bytes
from wasi_export.errors import ConfigError, IntegrityError, MalformedError, first_line
from wasi_export.settings import Frozen
from wasi_export.subspace.inject import subspace_layers
from wasi_export.untrusted.document import parse_document

CHECKPOINT = "checkpoint.safetensors"


class EpochMetrics(Frozen):
    """One line of metrics.jsonl."""

    epoch: int
    """Counted from 1."""
    step: int
    """Optimiser steps so far."""
    train_loss: float
    val_loss: float
    val_accuracy: float
    lr: float
    """Learning rate of all but the head, at the last step."""
    seconds: float
    """Wall time of the training steps, with loading, without evaluation."""
    cpu_seconds: float
    """Processor time of the same, without the loader's workers."""
    images_per_second: float


class Position(Frozen):
    """How far training is. Losses are kept exactly, so that a resumed run reports the same."""

    key: str
    epoch: int = 0
    batch: int = 0
    """Batches done in this epoch."""
    step: int = 0
    part: int = 0
    """Of a training whose model changes its layers: which of the models is saved with it."""
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's batches."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: tuple[EpochMetrics, ...] = ()
    optimizer_numbers: Mapping[str, bool | int | float] = {}
    """What the optimiser keeps that is not a tensor."""


def save_position(path: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes parameters, buffers, optimiser state and position to one file."""
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
    numbers: dict[str, bool | int | float] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            elif value is not None:
                numbers[f"{index}.{name}"] = value
    header = position.model_copy(update={"optimizer_numbers": numbers}).model_dump_json()
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata={"position": header}))


def read_position(path: Path) -> Position | None:
    """Returns how far an unfinished training is; None where there is none.

    Raises:
        IntegrityError: the file is no checkpoint.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return parse_document((file.metadata() or {}).get("position", ""), Position)
    except (OSError, SafetensorError, MalformedError) as error:
        raise IntegrityError(
            f"{path} is not a checkpoint of a training run ({first_line(error)}): start anew with --force"
        ) from error


def position_to_resume(path: Path, key: str) -> Position | None:
    """Returns how far the training with this key is; None where nothing was begun.

    Raises:
        ConfigError: the checkpoint belongs to another configuration or start.
        IntegrityError: the file is no checkpoint.
    """
    position = read_position(path)
    if position is not None and position.key != key:
        raise ConfigError(
            f"{path} is of another configuration or start (key {position.key}, this is {key}): train with "
            "the same one to resume, or give --force to start anew"
        )
    return position


def restore(path: Path, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads what `save_position` wrote into a model and an optimiser, in place.

    Raises:
        IntegrityError: the tensors are not those of this model.
    """
    tensors = load_file(path)
    own = _model_tensors(model)
    stored = {
        name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")
    }
    wrong = sorted(own.keys() ^ stored.keys()) + sorted(
        name for name in own.keys() & stored.keys() if own[name].shape != stored[name].shape
    )
    if wrong:
        raise IntegrityError(
            f"{path} does not fit the model in {len(wrong)} tensors ({', '.join(wrong[:3])}): start anew "
            "with --force"
        )
    with torch.no_grad():
        for name, value in stored.items():
            own[name].copy_(value)
    for name, layer in subspace_layers(model):
        layer.passes = int(own[f"{name}.passes"])
    try:
        # The groups are those of the configuration, which the key covers.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": _optimizer_states(tensors, position)})
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{path} holds no state of this optimiser ({error!r}): start anew with --force"
        ) from error


def _optimizer_states(tensors: Mapping[str, Tensor], position: Position) -> dict[int, dict[str, Any]]:
    """Returns what the optimiser keeps of each parameter, by its index."""
    states: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            # A copy is aligned in memory as torch does it; in the file's buffer a product rounds differently.
            states.setdefault(int(index), {})[field] = value.clone()
    for name, number in position.optimizer_numbers.items():
        index, field = name.split(".", 1)
        states.setdefault(int(index), {})[field] = number
    return states


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and all buffers, those that a state_dict leaves out too; tied tensors once.

    The passes of factored layers are with them, as copies.
    """
    passes = {f"{name}.passes": torch.tensor(layer.passes) for name, layer in subspace_layers(model)}
    return dict(model.named_parameters()) | dict(model.named_buffers()) | passes
