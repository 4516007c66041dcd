"""What a subspace training does before its layers are factored: how many epochs, of what, at which rates."""

from dataclasses import dataclass

from wasi_export.config import Config, TrainConfig
from wasi_export.errors import ConfigError

LORA_RATE = 30
"""LoRA's best learning rate over that of all weights. On a ViT-S/14 (docs/accuracy.md): 1e-3 and 3e-5."""


@dataclass(frozen=True)
class FirstPart:
    """The epochs before the factorisation."""

    epochs: int
    lora: bool
    """Whether changes of the layers are trained (`subspace/lora.py`); else all weights are."""
    train: TrainConfig


def first_part(config: Config, *, goes_on: bool) -> FirstPart:
    """Returns the first part of the subspace stage; it may have no epoch.

    Args:
        config: the whole configuration.
        goes_on: whether training starts from a finished run. Without a word in the configuration the first
            part is then none; and its weights are worth keeping, as pretrained ones are.

    Raises:
        ConfigError: there are not so many epochs.
    """
    train, subspace = config.train.subspace, config.subspace
    epochs = subspace.dense_epochs
    if epochs is None:
        epochs = 0 if goes_on else train.epochs // 2
    if epochs > train.epochs:
        raise ConfigError(
            f"subspace.dense_epochs = {epochs} is above train.subspace.epochs = {train.epochs}: lower it"
        )
    known = goes_on or config.model.pretrained or config.model.checkpoint is not None
    lora = known if subspace.dense_method == "auto" else subspace.dense_method == "lora"
    return FirstPart(epochs, lora, lora_form(train) if lora else dense_form(train))


def dense_form(train: TrainConfig) -> TrainConfig:
    """Returns the training without what is for factored layers."""
    memory = train.memory.model_copy(update={"mlp_recompute": False})
    return train.model_copy(update={"update": "factors", "refresh_every": None, "memory": memory})


def lora_form(train: TrainConfig) -> TrainConfig:
    """Returns the training of LoRA: as of whole layers, at its own learning rate."""
    lr = LORA_RATE * train.lr if train.lora_lr == "auto" else train.lora_lr
    return dense_form(train).model_copy(update={"lr": lr, "head_lr": train.head_lr or train.lr})
