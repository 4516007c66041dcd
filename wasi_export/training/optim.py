"""Optimiser, parameter groups and learning-rate schedule, all of them timm's."""

import difflib
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError
from wasi_export.subspace import SubspaceLinear, subspace_layers
from wasi_export.subspace.gauge import GaugeFix
from wasi_export.subspace.update import WsiUpdate, rate_scale
from wasi_export.training.models import head_modules

SCHEDULES = ("cosine", "tanh", "poly", "wsd", "rsqrt", "constant")
"""timm's schedules that are a function of the step alone, so that a resumed run needs no state of them."""


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Returns timm's weight-decay groups, split by learning rate: of the head, of the factors, of the rest.

    As in timm, vectors, biases and what the model lists (position embedding, class token) are not decayed;
    the factors `left` and `right` are.
    """
    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    rates: dict[int, float | None] = {}
    for _, layer in subspace_layers(model):
        rates[id(layer.left)], rates[id(layer.right)] = factor_rates(layer, config)
    rates |= {id(p): config.head_lr for module in head_modules(model) for p in module.parameters()}
    groups = []
    for group in param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=excluded):
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rates.get(id(parameter)) or config.lr, []).append(parameter)
        for lr, parameters in by_rate.items():
            groups.append({"params": parameters, "weight_decay": group["weight_decay"], "lr": lr})
    return groups


def factor_rates(layer: SubspaceLinear, config: TrainConfig) -> tuple[float, float]:
    """Returns the learning rates of `left` and `right` of a layer."""
    if config.factor_lr == "auto":
        left, right = rate_scale(layer)
        return left * config.lr, right * config.lr
    return config.factor_lr, config.factor_lr


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Returns timm's optimiser over `parameter_groups`, with the update rule of the factored layers attached.

    The rules change the layers, in place: `right` freezes every `left`, `wsi` makes the layers collect the
    gradients of their weights and ends with each step of the optimiser, as `factors` does.

    Raises:
        ConfigError: timm has no such optimiser, the rule cannot be had with it, or no layer is factored.
    """
    layers = dict(subspace_layers(model))
    if config.update != "factors" and not layers:
        raise ConfigError(
            f'update = "{config.update}" is for factored layers, and the model has none: leave it out, or '
            "set it in train.subspace"
        )
    if config.update == "right":
        for layer in layers.values():
            layer.left.requires_grad_(False)
    known: list[str] = list_optimizers()
    if config.opt.lower() not in known:
        near = difflib.get_close_matches(config.opt.lower(), known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.optim.list_optimizers()"
        raise ConfigError(f"timm {timm.__version__} has no optimizer {config.opt!r}: {hint}")
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        parameter_groups(model, config), opt=config.opt, lr=config.lr, momentum=config.momentum
    )
    if config.update == "wsi":
        WsiUpdate(layers, momentum=config.momentum, refresh_every=config.refresh_every).attach(optimizer)
    elif config.update == "factors" and layers:
        GaugeFix(layers, config.opt).attach(optimizer)
    return optimizer


def common_rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Returns the learning rate of all but the head, as it is now; that of the head where there is no other.

    Vectors come first in `parameter_groups`, so in a factored model it is not that of the factors.
    """
    head = {id(p) for module in head_modules(model) for p in module.parameters()}
    groups = optimizer.param_groups
    others = (group["lr"] for group in groups if any(id(p) not in head for p in group["params"]))
    rate: float = next(others, groups[0]["lr"])
    return rate


class Schedule:
    """timm's schedule, with warm-ups in which each group takes a growing share of its own rate.

    timm's own starts all groups from one rate, which may be above that of the head.
    """

    def __init__(
        self, scheduler: Scheduler, optimizer: torch.optim.Optimizer, *, warmup: int, start: int, again: int
    ) -> None:
        """Makes it of a scheduler with a warm-up of `warmup` steps; another one of `again` begins at `start`.

        The first goes to the highest rate, the other to that of the schedule.
        """
        self._scheduler, self._optimizer = scheduler, optimizer
        self._warmup, self._start, self._again = warmup, start, again if start else 0

    def step_update(self, step: int) -> None:
        """Sets the learning rates of a step, counted from 0."""
        self._scheduler.step_update(step)
        taken = step - self._start + 1
        for group in self._optimizer.param_groups:
            if step < self._warmup:
                group["lr"] = group["initial_lr"] * (step + 1) / (self._warmup + 1)
            if taken <= self._again:
                group["lr"] *= taken / (self._again + 1)


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int, *, start: int = 0
) -> Schedule:
    """Returns timm's schedule, to be asked with `step_update(step)` before every step.

    The warm-up is linear from the first step, in each group to its own rate, and takes at most half of all
    steps; where training goes on at the step `start` it is done again, in at most half of the rest.

    Raises:
        ConfigError: the schedule is unknown, or depends on more than the step.
    """
    if config.sched not in SCHEDULES:
        raise ConfigError(f"sched must be one of {', '.join(SCHEDULES)}, got {config.sched!r}")
    warmup = min(config.warmup_steps, total_steps // 2)
    # With one update an epoch, what timm calls an epoch is a step.
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=max(1, total_steps),
        warmup_epochs=warmup,  # where the schedule starts (wsd) or how it falls (rsqrt); rates: see Schedule
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    if scheduler is None:
        raise ConfigError(f"timm {timm.__version__} has no schedule {config.sched!r}: update timm")
    again = min(config.warmup_steps, (total_steps - start) // 2)
    return Schedule(scheduler, optimizer, warmup=warmup, start=start, again=again)
