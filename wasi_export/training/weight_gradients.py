"""Gradients of weights that the `wsi` rule collects in factored form: what happens to them before the update.

G = C·Bᵀ with orthonormal columns of B, so that ‖G‖ = ‖C‖: whatever is done with norms and factors of
gradients is done with C (`WeightGradient.coefficients`).
"""

from collections.abc import Iterable
from dataclasses import replace

from accelerate import Accelerator
from torch import nn
from torch.nn.utils import get_total_norm

from wasi_export.subspace.linear import SubspaceLinear


def average_over_processes(accelerator: Accelerator, layers: Iterable[SubspaceLinear]) -> None:
    """Replaces the collected gradients of the layers by their means over all processes, in place.

    The layers share their bases (`SubspaceLinear.share_bases`), so that coefficients are all that differs.
    """
    if accelerator.num_processes == 1:
        return
    for layer in layers:
        if (gradient := layer.weight_gradient) is not None:
            mean = accelerator.reduce(gradient.coefficients, "mean")
            layer.weight_gradient = replace(gradient, coefficients=mean)


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
