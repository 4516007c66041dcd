"""Clipping of gradients that are kept as factors; the mean over processes is in test_processes.py."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from wasi_export.subspace.autograd import WeightGradient
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.training.weight_gradients import clip_gradients


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("max_norm", "clipped"), [(1.0, True), (1e6, False)])
def test_clipping_the_factored_gradients_is_clipping_the_dense_ones(max_norm, clipped):
    model = nn.Sequential(SubspaceLinear(9, 7, 3), nn.Linear(7, 5))
    layer, other = model
    coefficients, basis = normal(7, 4, seed=0), torch.linalg.qr(normal(9, 4, seed=1))[0]
    layer.weight_gradient = WeightGradient(coefficients.clone(), basis)
    for seed, parameter in enumerate((layer.bias, *other.parameters())):
        parameter.grad = normal(*parameter.shape, seed=seed)

    dense = [
        nn.Parameter(torch.zeros(7, 9)),
        *(nn.Parameter(p.detach()) for p in (layer.bias, *other.parameters())),
    ]
    dense[0].grad = coefficients @ basis.T
    for twin, parameter in zip(dense[1:], (layer.bias, *other.parameters()), strict=True):
        twin.grad = parameter.grad.clone()
    norm = clip_grad_norm_(dense, max_norm)
    assert (norm > max_norm) == clipped

    clip_gradients(model, [layer], max_norm)
    torch.testing.assert_close(layer.weight_gradient.coefficients @ basis.T, dense[0].grad)
    for twin, parameter in zip(dense[1:], (layer.bias, *other.parameters()), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad)
    assert torch.equal(layer.weight_gradient.coefficients, coefficients) != clipped


def test_layers_that_collected_nothing_are_passed_over():
    layer = SubspaceLinear(9, 7, 3)
    layer.bias.grad = torch.full((7,), 10.0)
    clip_gradients(layer, [layer], 1.0)
    torch.testing.assert_close(layer.bias.grad.norm(), torch.tensor(1.0))
