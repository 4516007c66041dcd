"""An optimiser that goes on with the moments that a board ended with."""

import pytest
import torch
from torch import nn

from wasi_export.errors import ConfigError
from wasi_export.run_folder import STEPS
from wasi_export.training.warm_optimizer import take_over


def taken(steps, *, warm_from=None):
    """Returns a layer after AdamW steps on fixed gradients, and its optimiser."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    if warm_from is not None:
        layer.load_state_dict(warm_from[0])
        take_over(optimizer, layer, warm_from[1])
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return layer, optimizer


def as_on_a_board(layer, optimizer):
    state = {}
    for name, parameter in layer.named_parameters():
        found = optimizer.state[parameter]
        state |= {f"{name}.{moment}": found[moment] for moment in ("exp_avg", "exp_avg_sq")}
        state[STEPS] = found["step"]
    return {name: tensor.clone() for name, tensor in state.items()}


def test_steps_in_two_places_are_those_in_one_to_the_bit():
    torch.manual_seed(0)
    first, optimizer = taken(range(3))
    weights = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    resumed, _ = taken(range(3, 6), warm_from=(weights, as_on_a_board(first, optimizer)))
    cold, _ = taken(range(3, 6), warm_from=(weights, {}))
    torch.manual_seed(0)
    whole, _ = taken(range(6))
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    assert not torch.allclose(cold.weight, whole.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape"), [("weight.exp_avg", (9, 9)), ("other.exp_avg", (2, 3)), ("weight.previous", (2, 3))]
)
def test_a_state_that_does_not_fit_is_refused(name, shape):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    with pytest.raises(ConfigError, match=rf"the optimiser's state has {name} \[{shape[0]}, {shape[1]}\]"):
        take_over(optimizer, layer, {name: torch.zeros(shape)})
