"""What a training starts from: the weights of a configuration, or a finished run."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from wasi_export.config import Config
from wasi_export.errors import ConfigError
from wasi_export.ranks import Plan
from wasi_export.training.checkpoint import load_run
from wasi_export.training.data import random_numbers
from wasi_export.training.models import create_model


@dataclass(frozen=True)
class Beginning:
    """The first weights of a training."""

    model: nn.Module
    plan: Plan | None = None
    """Of a model that is factored already."""
    optimizer: dict[str, Tensor] | None = None
    """By parameter and moment, of a run that comes from a board."""


def first_model(config: Config, classes: tuple[str, ...], init: Path | None = None) -> nn.Module:
    """Returns the dense model with the weights it starts from; random ones follow from the seed.

    Args:
        config: the model and the seed.
        classes: of the training images.
        init: a finished dense run that gives the weights; None: `config.model` does.

    Raises:
        ConfigError: `init` is of another model or other classes, or is factored already.
    """
    begun = begin(config, classes, init)
    if begun.plan is not None:
        raise ConfigError(f"{init} is factored already: give a dense run as --init")
    return begun.model


def begin(config: Config, classes: tuple[str, ...], init: Path | None = None) -> Beginning:
    """Returns what a training starts from; random weights follow from the seed.

    Args:
        config: the model and the seed.
        classes: of the training images.
        init: a finished run that gives the weights; None: `config.model` does.

    Raises:
        ConfigError: `init` is of another model or other classes.
    """
    if init is None:
        with random_numbers(config.seed):
            return Beginning(create_model(config.model, len(classes)))
    run = load_run(init)
    if run.facts.classes != classes:
        raise ConfigError(
            f"{init} was trained for {len(run.facts.classes)} classes "
            f"({', '.join(run.facts.classes[:5])}, …), "
            f"the data have {len(classes)} ({', '.join(classes[:5])}, …)"
        )
    for field in ("name", "img_size", "in_chans", "kwargs"):
        there, here = getattr(run.config.model, field), getattr(config.model, field)
        if there != here:
            raise ConfigError(
                f"{init} is of another model: model.{field} is {there!r} there and {here!r} here"
            )
    return Beginning(run.model, run.plan, run.optimizer)
