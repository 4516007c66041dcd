"""One step of training as functions of tensors alone: forward, gradient, clipping, update.

    loss, correct, ‖g‖, w', s' = step(images, targets, lr, decay, clip, w, s, frozen)

Or in two halves, with sums a between them, where one update is to be that of several batches:

    loss, correct, a' = gradient(images, targets, w, bases, a, frozen)      a' = a + n·g, n images
    ‖g‖, w', s'       = update(lr, decay, clip, w, s, a)                    g = a / Σ n

They keep nothing: what they change comes back under the same names. The gradient is clipped to a norm of
`clip` over all trained parameters; infinity leaves it as it is. No update can be done before the norm is
there, and the norm not before everything has been read that an update changes: see `in_place.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from wasi_export.converters.step_graph import optimizers, wsi
from wasi_export.converters.step_graph.barrier import after
from wasi_export.converters.step_graph.compress import FEATURE, Kept, Sink, basis_tensors, compressing
from wasi_export.converters.step_graph.losses import LossName, loss_and_correct
from wasi_export.converters.step_graph.optimizers import MOMENTUM, OptimizerName, Rates
from wasi_export.converters.step_graph.orthonormal import orthonormalize
from wasi_export.converters.step_graph.recompute import Recompute, recomputed_modules, recomputing
from wasi_export.converters.step_graph.sums import Found, Sums
from wasi_export.errors import ConfigError
from wasi_export.subspace import subspace_layers
from wasi_export.subspace.tucker import Bases

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
    momentum: float = MOMENTUM
    """Of `opt` "momentum", and of the `wsi` rule."""
    bases: Mapping[str, Bases] = field(default_factory=dict)
    """By layer whose input is kept compressed: the bases of the first step."""
    wsi: bool = False
    """Whether the factors of the layers with bases follow the `wsi` rule; `opt` is for the rest."""
    accumulate: bool = False
    """Whether the step is in two halves, for one update of several batches."""


class StepFunction:
    """The step of a model, with its tensors in a list as a tracer needs them."""

    def __init__(self, model: nn.Module, trainable: Sequence[str], settings: StepSettings) -> None:
        """Takes the tensors of a model as they are.

        Args:
            model: in eval mode.
            trainable: names of the parameters that are trained.
            settings: of the step.

        Raises:
            ConfigError: a layer cannot follow the `wsi` rule.
        """
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        self.model, self.settings = model, settings
        self.parameters = {name: detached[name] for name in trainable}
        self.layers = {name: layer for name, layer in subspace_layers(model) if name in settings.bases}
        self.moved = _under_wsi(model, self.parameters, settings)
        factors = {f"{layer}.{part}" for layer in self.moved for part in (wsi.LEFT, wsi.RIGHT)}
        self.rest = [name for name in trainable if name not in factors]
        # Copies: a trace would take one tensor under two names for one input.
        self.bases = {name: basis.clone() for name, basis in basis_tensors(settings.bases).items()}
        self.state = {
            **optimizers.initial_state(settings.opt, {name: self.parameters[name] for name in self.rest}),
            **wsi.initial_state(self.moved, self.parameters, settings.momentum),
            **self.bases,
        }
        self.sums = Sums(self._gradients_like(), self.bases)
        own = {*self.parameters, *self.bases}
        self.frozen = {name: tensor for name, tensor in detached.items() if name not in own}
        self.rates = {name: settings.rates.get(name, Rates()) for name in trainable}

    def step(self, images: Tensor, targets: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Returns `SUMMARY`, the new parameters and the new state; takes `SCALARS` before its tensors."""
        scalars, given = tensors[:3], tensors[3:]
        parameters, given = _named(self.parameters, given)
        state, given = _named(self.state, given)
        frozen, _ = _named(self.frozen, given)
        found = self._differentiate(images, targets, parameters, state, frozen)
        norm, new = self._update(found.gradients, found.moments, parameters, state, scalars)
        return [found.loss, found.correct, norm, *(new[name] for name in (*self.parameters, *self.state))]

    def gradient(self, images: Tensor, targets: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Returns loss and number of right answers of all images so far, and the new sums.

        It takes parameters, bases, sums and frozen tensors.
        """
        parameters, given = _named(self.parameters, tensors)
        bases, given = _named(self.bases, given)
        sums, given = _named(self.sums.initial, given)
        frozen, _ = _named(self.frozen, given)
        found = self._differentiate(images, targets, parameters, bases, frozen, summed=True)
        new = self.sums.add(sums, images.shape[0], found)
        return [*self.sums.summary(new), *(new[name] for name in self.sums.initial)]

    def update(self, *tensors: Tensor) -> list[Tensor]:
        """Returns the norm of the gradient, the new parameters and the new state.

        It takes `SCALARS`, parameters, state and sums.
        """
        scalars, given = tensors[:3], tensors[3:]
        parameters, given = _named(self.parameters, given)
        state, given = _named(self.state, given)
        sums, _ = _named(self.sums.initial, given)
        norm, new = self._update(
            self.sums.gradients(sums), self.sums.moments(sums), parameters, state, scalars
        )
        return [norm, *(new[name] for name in (*self.parameters, *self.state))]

    def _differentiate(
        self,
        images: Tensor,
        targets: Tensor,
        parameters: Mapping[str, Tensor],
        bases: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        *,
        summed: bool = False,
    ) -> Found:
        """Returns what the mean loss of images gives, or its sum over them."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        kept = Kept(sinks={layer: Sink() for layer in self.moved})
        again = self.settings.recompute
        # The gradient is taken while the tensors are in the model: a block that is computed again finds them.
        with (
            _installed(self.model, {**leaves, **frozen}),
            compressing(self.layers, bases, kept, recomputed_modules(self.model, again)),
            recomputing(self.model, again),
            torch.enable_grad(),
        ):
            loss, correct = loss_and_correct(
                self.settings.loss, self.model(images), targets, smoothing=self.settings.smoothing
            )
            loss = loss * images.shape[0] if summed else loss
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        known: dict[str, Tensor | None] = dict(zip(leaves, found, strict=True))
        for layer, sink in kept.sinks.items():
            gradient = sink.weight_gradient
            known[f"{layer}.{wsi.WEIGHT}"] = None if gradient is None else gradient.coefficients
        gradients = {name: g for name in self.sums.gradients_like if (g := known[name]) is not None}
        if idle := [name for name in self.sums.gradients_like if name not in gradients]:
            raise ConfigError(f"{', '.join(idle[:3])} cannot be trained: the outputs do not depend on it")
        return Found(loss.detach(), correct, gradients, kept.moments)

    def _update(
        self,
        gradients: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        scalars: Sequence[Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the norm of the gradient, and the new parameters and state by name."""
        lr, decay, clip = scalars
        norm = torch.stack([(g * g).sum() for g in gradients.values()]).sum().sqrt()
        share = (clip / (norm + 1e-6)).clamp(max=1.0)
        clipped = {name: g * share for name, g in gradients.items()}
        rates, momentum = self.rates, self.settings.momentum
        rest = {name: parameters[name] for name in self.rest}
        new = optimizers.update(
            self.settings.opt, rest, clipped, state, rates, lr=lr, decay=decay, momentum=momentum
        )
        weights = {
            layer: wsi.WeightStep(clipped[f"{layer}.{wsi.WEIGHT}"], state[f"{layer}.{FEATURE}"])
            for layer in self.moved
        }
        new |= wsi.update(parameters, weights, state, rates, lr=lr, decay=decay, momentum=momentum)
        for layer, bases in self.settings.bases.items():
            # Of what reads the old basis these come last.
            last = [norm, new[f"{layer}.{wsi.RIGHT}"]] if layer in self.moved else [norm]
            for name in basis_tensors({layer: bases}):
                new[name] = after(orthonormalize(moments[name]), *last)
        return norm, new

    def _gradients_like(self) -> dict[str, Tensor]:
        """Returns tensors of the names and shapes of the gradients, in the order of the model.

        The order counts: onnxruntime makes the last of what the norm reads first, so that a layer's gradients
        are made together, and its dY is not kept for one of them.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            layer = name.rpartition(".")[0]
            if name in self.rest:
                found[name] = parameter.detach()
            elif name in self.parameters:  # C, once for both factors
                rank = self.bases[f"{layer}.{FEATURE}"].shape[1]
                found[f"{layer}.{wsi.WEIGHT}"] = torch.zeros(self.layers[layer].out_features, rank)
        return found


def _under_wsi(model: nn.Module, parameters: Mapping[str, Tensor], settings: StepSettings) -> list[str]:
    """Returns the names of the layers whose factors follow the `wsi` rule.

    Raises:
        ConfigError: one factor of a layer is trained and the other is not, or a layer has no feature basis.
    """
    if not settings.wsi:
        return []
    found = []
    for name, _ in subspace_layers(model):
        trained = [part for part in (wsi.LEFT, wsi.RIGHT) if f"{name}.{part}" in parameters]
        if len(trained) == 1:
            raise ConfigError(
                f'update = "wsi" moves both factors, and only {trained[0]} of {name} is trained'
            )
        if trained and settings.bases.get(name, Bases()).feature is None:
            raise ConfigError(
                f'update = "wsi" takes the gradient of a weight in the basis of its input, and {name} keeps '
                "its input whole: set adapt.activation, or lower adapt.activation_epsilon"
            )
        found += [name] if trained else []
    if not found:
        raise ConfigError('update = "wsi" is for factored layers, and none is trained: leave it out')
    return found


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
