"""Gradients of weights that the `wsi` rule collects in factored form: what happens to them before the update.

G = C·Bᵀ with orthonormal columns of B, so that ‖G‖ = ‖C‖: whatever is done with norms and factors of
gradients is done with C (`WeightGradient.coefficients`).
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from wasi_export.subspace.autograd import WeightGradient
from wasi_export.subspace.linear import SubspaceLinear


def average_over_processes(accelerator: Accelerator, layers: Iterable[SubspaceLinear]) -> None:
    """Replaces the collected gradients of the layers by their means over all processes, in place.

    Processes whose bases differ, as they do in the steps in which bases move, add columns to the basis.
    """
    if accelerator.num_processes == 1:
        return
    for layer in layers:
        if layer.weight_gradient is not None:
            layer.weight_gradient = _mean(accelerator, layer.weight_gradient)


def clip_gradients(model: nn.Module, layers: Iterable[SubspaceLinear], max_norm: float) -> None:
    """Scales all gradients, collected ones and those of the other parameters, in place, to a norm of at most.

    Args:
        model: with the gradients of its parameters.
        layers: with the gradients that they collected.
        max_norm: of all gradients together, as `torch.nn.utils.clip_grad_norm_` takes it.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients += [layer.weight_gradient.coefficients for layer in layers if layer.weight_gradient is not None]
    factor = (max_norm / (get_total_norm(gradients) + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch
    for gradient in gradients:
        gradient.mul_(factor)


def _mean(accelerator: Accelerator, gradient: WeightGradient) -> WeightGradient:
    """Returns the mean over the processes, the same on each."""
    coefficients = _gathered(accelerator, gradient.coefficients) / accelerator.num_processes
    bases = list(_gathered(accelerator, gradient.basis))
    # `add` knows a common basis by its identity.
    bases = [bases[0] if torch.equal(basis, bases[0]) else basis for basis in bases]
    parts = [replace(gradient, coefficients=c, basis=b) for c, b in zip(coefficients, bases, strict=True)]
    return reduce(type(gradient).add, parts)


def _gathered(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Returns the tensors of all processes along a new first axis."""
    gathered: Tensor = accelerator.gather(tensor[None].contiguous())
    return gathered
