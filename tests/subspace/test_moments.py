"""Second moments do not depend on how the data came, but for rounding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wasi_export.subspace.conv import SubspaceConv1x1
from wasi_export.subspace.kinds import LinearKind
from wasi_export.subspace.moments import (
    InputMoments,
    PrincipalAxes,
    collect_gradients,
    collect_moments,
    leading_axes,
)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(0))


def test_the_moment_is_the_sum_over_tokens_whatever_the_batches() -> None:
    layer, x = nn.Linear(4, 3), images()
    whole = collect_moments(layer, {"fc": layer}, [x], total=1)["fc"]
    parts = collect_moments(layer, {"fc": layer}, x.split([1, 4, 1]), total=3)["fc"]
    flat = x.reshape(-1, 4).double()
    assert whole.feature is not None
    assert whole.token is not None
    assert torch.allclose(whole.feature, flat.T @ flat, rtol=1e-5)
    assert torch.allclose(whole.token, torch.einsum("bni,bmi->nm", x, x).double(), rtol=1e-5, atol=1e-5)
    assert parts.feature is not None
    assert torch.allclose(whole.feature, parts.feature, rtol=1e-5, atol=1e-5)


def test_the_model_keeps_its_mode_and_carries_no_hooks_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    collect_moments(model, {"0": model[0]}, [images()], total=1)
    assert model.training
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("make", [nn.Conv2d, SubspaceConv1x1])
def test_of_a_convolution_the_moment_is_that_of_the_pixels_it_looks_at(
    make: Callable[..., nn.Module],
) -> None:
    layer, x = make(3, 4, 1, stride=(1, 2)), torch.randn(2, 3, 4, 6)
    found = collect_moments(layer, {"conv": layer}, [x], total=1)["conv"]
    rows = x[..., ::2].permute(0, 2, 3, 1).reshape(-1, 3)
    assert found.feature is not None
    assert torch.allclose(found.feature, (rows.T @ rows).double(), rtol=1e-5, atol=1e-5)
    assert found.token_count == 12


def test_token_moments_are_dropped_when_the_token_count_changes() -> None:
    moments = InputMoments()
    for tokens in (5, 6, 6):
        moments.add(torch.ones(2, tokens, 4))
    assert moments.token is None
    assert moments.token_count is None
    assert moments.feature is not None


def test_the_pixels_of_an_image_are_tokens_up_to_a_number() -> None:
    few, many = InputMoments(), InputMoments()
    few.add(torch.ones(2, 3, 4, 5))
    many.add(torch.ones(2, 33, 32, 5))
    assert few.token is not None
    assert few.token.shape == (few.token_count, few.token_count) == (12, 12)
    assert many.feature is not None
    assert many.token is None


def test_the_batch_moment_is_that_of_the_first_batch() -> None:
    moments, x = InputMoments(), images()
    for batch in x.split([4, 2]):
        moments.add(batch)
    rows = x[:4].reshape(4, -1)
    assert moments.batch is not None
    assert torch.allclose(moments.batch, (rows @ rows.T).double())


def test_principal_axes_come_largest_first() -> None:
    axes = PrincipalAxes.of(torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64)))
    assert axes is not None
    assert axes.values.tolist() == [9.0, 4.0, 1.0]
    assert axes.vectors[:, 0].abs().tolist() == [0.0, 1.0, 0.0]


def test_the_leading_axes_are_a_basis_and_a_whole_mode_has_none() -> None:
    flat = images().reshape(-1, 4).double()
    axes = PrincipalAxes.of(flat.T @ flat)
    basis = leading_axes(axes, 3)
    assert basis is not None
    assert (basis.dtype, basis.shape, basis.is_contiguous()) == (torch.float32, (4, 3), True)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-6)
    assert leading_axes(axes, None) is None
    assert leading_axes(None, 3) is None


def test_gradient_moments_are_those_of_autograd_whatever_the_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)).train()
    x = images(20)
    kinds = {name: LinearKind(model.get_submodule(name)) for name in ("0", "2")}

    def scalar(network: nn.Module, inputs: Tensor) -> Tensor:
        value: Tensor = network(inputs).square().sum()
        return value

    found = collect_gradients(model, kinds, x.split([13, 7]), scalar, total=2)
    hidden = model[0](x)
    hidden.retain_grad()
    output = model[2](model[1](hidden))
    output.retain_grad()
    output.square().sum().backward()
    for name, tensor in (("0", hidden), ("2", output)):
        assert tensor.grad is not None
        flat = tensor.grad.flatten(0, 1).double()
        assert torch.allclose(found[name], flat.T @ flat / 100, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is not None for parameter in model.parameters())  # of the backward above
    assert model.training


def test_frozen_layers_have_gradient_moments_and_parameters_get_no_gradient() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    found = collect_gradients(model, {"": LinearKind(model)}, [images()], lambda m, x: m(x).sum(), total=1)
    assert torch.allclose(found[""], torch.ones(3, 3).double())
    assert model.weight.grad is None
