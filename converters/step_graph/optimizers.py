"""Update rules as arithmetic on tensors, each that of torch to the rounding.

    SGD         w' = w - η·(g + λ·w)
    momentum    m' = μ·m + g + λ·w,  w' = w - η·m'                       (torch.optim.SGD, no dampening)
    AdamW       w' = (1 - η·λ)·w - η·m̂ / (√v̂ + ε),  m̂ = m'/(1 - β₁ᵗ),  v̂ = v'/(1 - β₂ᵗ)

η is the rate of the step times that of the parameter, λ the decay of the step where the parameter is decayed.

Source: torch.optim; AdamW is arXiv 1711.05101, algorithm 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from wasi_export.run_folder import STEPS

OptimizerName = Literal["sgd", "momentum", "adamw"]
MOMENTUM = 0.9
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
_MOMENTS: Mapping[OptimizerName, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
}


@dataclass(frozen=True)
class Rates:
    """What a parameter multiplies the rate and the decay of a step with."""

    lr: float = 1.0
    decay: float = 1.0


def initial_state(name: OptimizerName, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state before the first step: zeros, by `<parameter>.<moment>`."""
    state = {
        f"{parameter}.{moment}": torch.zeros_like(tensor)
        for parameter, tensor in parameters.items()
        for moment in _MOMENTS[name]
    }
    return state | ({STEPS: torch.zeros(())} if name == "adamw" else {})


def update(
    name: OptimizerName,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    rates: Mapping[str, Rates],
    *,
    lr: Tensor,
    decay: Tensor,
    momentum: float = MOMENTUM,
) -> dict[str, Tensor]:
    """Returns the new parameters and the new state, under the names of the old ones.

    Args:
        name: of the rule.
        parameters: by name.
        gradients: by the names of parameters.
        state: of the rule.
        rates: by the names of parameters.
        lr: of the step, a scalar.
        decay: of the step, a scalar.
        momentum: μ.
    """
    new: dict[str, Tensor] = {}
    first = second = lr
    if name == "adamw":
        new[STEPS] = state[STEPS] + 1
        first = 1 - BETA1 ** new[STEPS]
        second = (1 - BETA2 ** new[STEPS]).sqrt()
    for key, w in parameters.items():
        g, eta = gradients[key], lr * rates[key].lr
        shrunk = rates[key].decay * decay
        if name == "adamw":
            m = BETA1 * state[f"{key}.exp_avg"] + (1 - BETA1) * g
            v = BETA2 * state[f"{key}.exp_avg_sq"] + (1 - BETA2) * (g * g)
            step = (m * (eta / first)) / (v.sqrt() / second + EPS)
            new[key] = (w * (1 - eta * shrunk) if rates[key].decay else w) - step
            new[f"{key}.exp_avg"], new[f"{key}.exp_avg_sq"] = m, v
            continue
        if rates[key].decay:
            g = g + shrunk * w
        if name == "momentum":
            g = momentum * state[f"{key}.momentum_buffer"] + g
            new[f"{key}.momentum_buffer"] = g
        new[key] = w - eta * g
    return new
