"""What a whole model costs for one image, counted while it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wasi_export.allocate import ModelRest
from wasi_export.subspace.kinds import Kind
from wasi_export.subspace.observe import observed


@dataclass(frozen=True)
class ModelCost:
    """Parameters and multiply-adds of a model for one image, and the rows that its layers get."""

    parameters: int
    macs: int
    """Of Linear layers, convolutions and the two products of attention; nothing else counts."""
    tokens: Mapping[str, int]
    """Rows of the input of each named layer."""

    def rest(self, weights: Mapping[str, int]) -> ModelRest:
        """Returns what is left without the weights of named layers, given their numbers of parameters."""
        return ModelRest(
            parameters=self.parameters - sum(weights.values()),
            macs=self.macs - sum(count * self.tokens[name] for name, count in weights.items()),
        )


@torch.no_grad()
def measure_model_cost(model: nn.Module, layers: Mapping[str, Kind], image: Tensor) -> ModelCost:
    """Returns the cost of a model, from one pass of one image.

    The model runs in evaluation mode and is left in the mode it was in.

    Args:
        model: any module.
        layers: whose rows are counted, by name.
        image: (1, C, H, W).
    """
    tokens: dict[str, int] = {}
    hooks = (
        kind.module.register_forward_pre_hook(_row_counter(name, kind, tokens))
        for name, kind in layers.items()
    )
    # The counter cannot hook a parameter that is a module's input, as the class token of a CaiT is.
    detached = {name: parameter.detach() for name, parameter in model.named_parameters()}
    image = image.to(next(model.parameters()).device)
    # Without the fused kernels: which of them are counted differs between versions of torch.
    with observed(model, hooks), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        functional_call(model, detached, (image,))
    return ModelCost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        tokens=tokens,
    )


def _row_counter(
    name: str, kind: Kind, tokens: dict[str, int]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens[name] = tokens.get(name, 0) + kind.rows(inputs[0]).numel() // kind.in_features

    return count
