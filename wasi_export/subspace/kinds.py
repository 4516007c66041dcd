"""Which layers can become factors, as what, and why the others cannot.

Every kind that can is a matrix W (O×I) applied to rows x (…, I) of the layer's input: then moments, spectra,
ranks and costs are those of a Linear layer, and only the way in and out of the rows differs.

    nn.Linear             W is the weight          rows are the input itself
    nn.Conv2d, 1×1        W is the weight, O×I     rows are the pixels, each stride-th of them

The rest is refused with a reason, which the plan keeps: the model trains and exports with it as it is. A
module is judged alone by `kind_of`; `find_kinds` adds what only the whole model shows: weights that are
shared, and weights that are used in other ways than by the layer's own forward pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from wasi_export.ranks import LayerPlan
from wasi_export.subspace.conv import SubspaceConv1x1, input_rows, pixel_rows
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.probe import foreign_uses


@dataclass(frozen=True)
class Kind(ABC):
    """A layer that can become factors."""

    module: nn.Linear | nn.Conv2d

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The weight as a matrix (O×I), without its gradient history; shares the layer's memory."""
        return self.module.weight.detach().flatten(1)

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        """The bias (O), without its gradient history."""
        return None if self.module.bias is None else self.module.bias.detach()

    @property
    def out_features(self) -> int:
        """O."""
        return self.module.weight.shape[0]

    @property
    def in_features(self) -> int:
        """I."""
        return self.module.weight.shape[1]

    def rows(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch d_in"]:
        """Returns the layer's input as the rows that the weight is applied to."""
        return input_rows(self.module, x)

    @abstractmethod
    def output_rows(self, y: Float[Tensor, "..."]) -> Float[Tensor, "*batch d_out"]:
        """Returns the layer's output as what the weight makes of the rows."""

    def empty_layer(self, decision: LayerPlan) -> SubspaceLinear:
        """Returns the factored layer of a plan, to be filled, with the layer's device, dtype and mode.

        Until then it has K rows of the weight, spread over all, and the bias: drawing factors would take a QR
        and change the random numbers of what comes after.
        """
        layer = self._new_layer(decision).to(self.weight.device, self.weight.dtype)
        columns = torch.arange(layer.rank)
        rows = columns * self.out_features // layer.rank
        with torch.no_grad():
            layer.left.zero_()
            layer.left[rows, columns] = 1
            layer.right.copy_(self.weight[rows])
            if layer.bias is not None and self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer.train(self.module.training)

    @abstractmethod
    def _new_layer(self, decision: LayerPlan) -> SubspaceLinear: ...


@dataclass(frozen=True)
class LinearKind(Kind):
    """A Linear layer on inputs (…, I)."""

    module: nn.Linear

    def output_rows(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """Returns the output itself."""
        return y

    def _new_layer(self, decision: LayerPlan) -> SubspaceLinear:
        assert decision.rank is not None
        return SubspaceLinear(
            decision.in_features,
            decision.out_features,
            decision.rank,
            bias=self.module.bias is not None,
            activation=decision.activation,
            draw=False,
        )


@dataclass(frozen=True)
class Conv1x1Kind(Kind):
    """A 1×1 convolution without groups and padding, on images (B, I, H, W)."""

    module: nn.Conv2d

    def output_rows(
        self, y: Float[Tensor, "batch d_out height width"]
    ) -> Float[Tensor, "batch height width d_out"]:
        """Returns the pixels of the output."""
        return pixel_rows(y, (1, 1))

    def _new_layer(self, decision: LayerPlan) -> SubspaceLinear:
        assert decision.rank is not None
        return SubspaceConv1x1(
            decision.in_features,
            decision.out_features,
            decision.rank,
            stride=_stride(self.module),
            bias=self.module.bias is not None,
            activation=decision.activation,
            draw=False,
        )


@dataclass(frozen=True)
class Refusal:
    """A layer with a weight that stays as it is, and why."""

    reason: str
    out_features: int
    in_features: int
    """Size of a filter, for a convolution."""

    def plan(self, name: str) -> LayerPlan:
        """Returns the plan that leaves the layer dense."""
        return LayerPlan(
            name=name,
            in_features=self.in_features,
            out_features=self.out_features,
            rank=None,
            method=None,
            energy=None,
            reason=f"dense: {self.reason}",
        )


def kind_of(module: nn.Module) -> Kind | Refusal | None:
    """Returns what a module alone says of itself; None: it is neither a Linear layer nor a convolution."""
    if not isinstance(module, (nn.Linear, _ConvNd)):
        return None
    if isinstance(module, nn.Linear):
        reason = _own_objection(module, nn.Linear)
        return LinearKind(module) if reason is None else _refusal(module, reason)
    if isinstance(module, nn.Conv2d):
        reason = _own_objection(module, nn.Conv2d) or _geometry_objection(module)
        return Conv1x1Kind(module) if reason is None else _refusal(module, reason)
    return _refusal(module, f"{type(module).__name__} has no factored form")


def find_kinds(model: nn.Module, images: Shaped[Tensor, "batch ..."] | None) -> dict[str, Kind | Refusal]:
    """Returns what every Linear layer and convolution of a model is, by name, in model order.

    Args:
        model: run once in evaluation mode, and left as it was.
        images: a batch of inputs; None: the model is not run, and a weight that another module uses
            directly (the qkv of a BEiT) is not found.
    """
    kinds = {name: kind for name, module in model.named_modules() if (kind := kind_of(module)) is not None}
    factorable = {name: kind for name, kind in kinds.items() if isinstance(kind, Kind)}
    objections = _shared_parameters(model, factorable)
    if images is not None:
        objections |= foreign_uses(model, {name: kind.module for name, kind in factorable.items()}, images)
    return kinds | {name: _refusal(factorable[name].module, reason) for name, reason in objections.items()}


def _own_objection(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Returns why a module cannot be taken for its base class."""
    if getattr(module.forward, "__func__", None) is not base.forward:
        return f"{type(module).__module__}.{type(module).__qualname__} has a forward pass of its own"
    if module._parameters.get("weight") is None:
        return "its weight is computed from others (a parametrisation)"
    if module._forward_pre_hooks or module._forward_hooks:
        return "it has hooks, which would be lost"
    return None


def _geometry_objection(conv: nn.Conv2d) -> str | None:
    if conv.groups > 1:
        kind = "depthwise" if conv.groups == conv.in_channels else "grouped"
        return f"{kind} convolution, whose weight is no matrix"
    if tuple(conv.kernel_size) != (1, 1):
        return f"{'×'.join(map(str, conv.kernel_size))} convolution, only 1×1 are factored"
    if conv.padding not in ((0, 0), "same", "valid"):
        return f"1×1 convolution with padding {conv.padding}"
    return None


def _refusal(module: nn.Linear | _ConvNd, reason: str) -> Refusal:
    weight = module.weight
    return Refusal(reason, out_features=weight.shape[0], in_features=weight[0].numel())


def _shared_parameters(model: nn.Module, kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Returns the layers that share a parameter with another name of the model, each with that name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    objections = {}
    for layer, kind in kinds.items():
        found = (name for parameter in kind.module.parameters() for name in names[id(parameter)])
        other = next((name for name in found if name.rpartition(".")[0] != layer), None)
        if other is not None:
            objections[layer] = f"it shares a parameter with {other}"
    return objections


def _stride(conv: nn.Conv2d) -> tuple[int, int]:
    height, width = conv.stride
    return int(height), int(width)
