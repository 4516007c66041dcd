"""One step of training as a function of tensors alone: forward, gradient, clipping, update.

    loss, correct, ‖g‖, w', s' = step(images, targets, lr, decay, clip, w, s, frozen)

It keeps nothing: what it changes comes back under the same names. The gradient is clipped to a norm of `clip`
over all trained parameters; infinity leaves it as it is. No update can be done before the norm is there,
and the norm not before everything has been read that an update changes: see `in_place.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from wasi_export.converters.step_graph.losses import LossName, loss_and_correct
from wasi_export.converters.step_graph.optimizers import OptimizerName, Rates, initial_state, update
from wasi_export.converters.step_graph.recompute import Recompute, recomputing
from wasi_export.errors import ConfigError
from wasi_export.subspace import subspace_layers

SCALARS = ("lr", "weight_decay", "clip_norm")
"""Inputs of a step that are numbers."""
SUMMARY = ("loss", "correct", "gradient_norm")
"""Outputs of a step that are numbers."""


@dataclass(frozen=True)
class StepSettings:
    """What is fixed in the graph of a step."""

    opt: OptimizerName = "adamw"
    loss: LossName = "cross_entropy"
    smoothing: float = 0.0
    recompute: Recompute = "block"
    rates: Mapping[str, Rates] = field(default_factory=dict)
    """By parameter; those that are not named have rates of one."""


class StepFunction:
    """The step of a model, with its tensors in a list as a tracer needs them."""

    def __init__(self, model: nn.Module, trainable: Sequence[str], settings: StepSettings) -> None:
        """Takes the tensors of a model as they are.

        Args:
            model: in eval mode.
            trainable: names of the parameters that are trained.
            settings: of the step.
        """
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        self.model, self.settings = model, settings
        self.parameters = {name: detached[name] for name in trainable}
        self.state = initial_state(settings.opt, self.parameters)
        self.frozen = {name: tensor for name, tensor in detached.items() if name not in self.parameters}
        self.rates = {name: settings.rates.get(name, Rates()) for name in trainable}

    def step(self, images: Tensor, targets: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Returns `SUMMARY`, the new parameters and the new state; takes `SCALARS` before its tensors."""
        (lr, decay, clip), given = tensors[:3], tensors[3:]
        parameters, given = _named(self.parameters, given)
        state, given = _named(self.state, given)
        frozen, _ = _named(self.frozen, given)
        loss, correct, gradients = self._differentiate(images, targets, parameters, frozen)
        norm = torch.stack([(g * g).sum() for g in gradients.values()]).sum().sqrt()
        share = (clip / (norm + 1e-6)).clamp(max=1.0)
        gradients = {name: g * share for name, g in gradients.items()}
        new = update(self.settings.opt, parameters, gradients, state, self.rates, lr=lr, decay=decay)
        return [loss, correct, norm, *(new[name] for name in (*self.parameters, *self.state))]

    def evaluate(self, images: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Returns the outputs [B, C] of the model for images."""
        parameters, rest = _named(self.parameters, tensors)
        frozen, _ = _named(self.frozen, rest)
        with _installed(self.model, {**parameters, **frozen}), torch.no_grad():
            return [self.model(images)]

    def _differentiate(
        self, images: Tensor, targets: Tensor, parameters: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        # The gradient is taken while the tensors are in the model: a block that is computed again finds them.
        with (
            _installed(self.model, {**leaves, **frozen}),
            recomputing(self.model, self.settings.recompute),
            torch.enable_grad(),
        ):
            loss, correct = loss_and_correct(
                self.settings.loss, self.model(images), targets, smoothing=self.settings.smoothing
            )
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {
            name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None
        }
        if idle := [name for name in leaves if name not in gradients]:
            raise ConfigError(f"{', '.join(idle[:3])} cannot be trained: the outputs do not depend on it")
        return loss.detach(), correct, gradients


@contextmanager
def _installed(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts tensors in the place of those of a model, and its layers in the form that can be traced."""
    attention: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    layers = [layer for _, layer in subspace_layers(model)]
    for module in attention:
        module.fused_attn = False  # its gradient has operators without a decomposition
    for layer in layers:
        layer.plain_autograd = True
    try:
        with _reparametrize_module(model, dict(tensors)):
            yield
    finally:
        for module in attention:
            module.fused_attn = True
        for layer in layers:
            layer.plain_autograd = False


def _named(
    names: Mapping[str, Tensor], tensors: tuple[Tensor, ...]
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Returns the first tensors by name, and the rest."""
    return dict(zip(names, tensors, strict=False)), tensors[len(names) :]
