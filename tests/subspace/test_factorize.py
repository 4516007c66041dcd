"""Factors of one weight: optimal, orthonormal, and safe on any moment."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wasi_export.config import SubspaceConfig
from wasi_export.subspace.factorize import Spectrum, plain_spectrum, whitened_spectrum
from wasi_export.subspace.inject import factorize_model
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.moments import PrincipalAxes

SHAPES = [(12, 7), (7, 12), (9, 9), (1, 5), (30, 4)]


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(width: int, tokens: int = 400) -> Tensor:
    """Inputs with a falling spectrum, as activations have."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width, width, dtype=torch.float64, generator=generator)
    scales = 2.0 ** -torch.arange(width, dtype=torch.float64)
    return torch.randn(tokens, width, dtype=torch.float64, generator=generator) @ (scales[:, None] * mixing)


def axes_of(x: Tensor) -> PrincipalAxes | None:
    return PrincipalAxes.of(x.T @ x)


def product(spectrum: Spectrum, weight: Tensor, rank: int) -> Tensor:
    """Returns left·right, in fp64, with the best right for that left."""
    left = spectrum.basis[:, :rank]
    return left @ (left.T @ weight)


def factored(weight: Tensor, x: Tensor, rank: int, method: str) -> SubspaceLinear:
    """Returns what takes the place of a layer of that weight, with x (tokens, I) as calibration."""
    model = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
    model[0].weight.data.copy_(weight)
    config = SubspaceConfig.model_validate({"rank": rank, "method": method, "sensitivity": "none"})
    factorize_model(model, [x.float()], config, total=1)
    assert isinstance(model[0], SubspaceLinear)
    return model[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_reaches_the_smallest_error_a_rank_can_have(shape: tuple[int, int]) -> None:
    weight = weight_of(shape)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, min(shape) + 1):
        error = (weight - product(plain_spectrum(weight), weight, rank)).norm()
        assert error == pytest.approx(values[rank:].norm().item(), abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_reaches_the_smallest_output_error_a_rank_can_have(shape: tuple[int, int]) -> None:
    weight, x = weight_of(shape), correlated_inputs(shape[1])
    spectrum, outputs = whitened_spectrum(weight, axes_of(x)), x @ weight.T
    values = torch.linalg.svdvals(outputs)
    for rank in range(1, min(shape) + 1):
        error = (outputs - x @ product(spectrum, weight, rank).T).norm()
        assert error == pytest.approx(values[rank:].norm().item(), abs=1e-6 * values[0].item())


@settings(deadline=None, max_examples=40)
@given(d_out=st.integers(1, 20), d_in=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_directions_are_orthonormal(d_out: int, d_in: int, seed: int) -> None:
    weight = weight_of((d_out, d_in), seed)
    for spectrum in (plain_spectrum(weight), whitened_spectrum(weight, axes_of(correlated_inputs(d_in)))):
        basis = spectrum.basis
        assert torch.allclose(basis.T @ basis, torch.eye(min(d_out, d_in), dtype=basis.dtype), atol=1e-10)


@pytest.mark.parametrize("method", ["plain", "whitened"])
@pytest.mark.parametrize(("shape", "rank"), [((24, 14), 8), ((14, 24), 5), ((9, 9), 1)])
def test_the_factors_of_a_layer_are_the_leading_directions_and_their_best_match(
    shape: tuple[int, int], rank: int, method: str
) -> None:
    """Up to the rounding of fp32: the layer's own type."""
    weight, x = weight_of(shape).float(), correlated_inputs(shape[1]).float()
    layer = factored(weight, x, rank, method)
    left, right = layer.left.detach(), layer.right.detach()
    assert left.dtype == right.dtype == torch.float32
    assert torch.allclose(left.T @ left, torch.eye(rank), atol=1e-6)
    assert torch.allclose(right, left.T @ weight, atol=1e-5)
    axes = PrincipalAxes.of((x.T @ x).double())
    spectrum = plain_spectrum(weight) if method == "plain" else whitened_spectrum(weight, axes)
    assert torch.allclose(left @ right, product(spectrum, weight.double(), rank).float(), atol=1e-4)


def test_a_white_input_makes_whitened_plain() -> None:
    weight = weight_of((12, 7))
    axes = PrincipalAxes.of(3 * torch.eye(7, dtype=torch.float64))
    whitened, plain = whitened_spectrum(weight, axes), plain_spectrum(weight)
    assert whitened.method == "whitened"
    assert torch.allclose(product(whitened, weight, 3), product(plain, weight, 3), atol=1e-10)


def test_a_singular_moment_still_gives_the_whole_weight_at_full_rank() -> None:
    weight, x = weight_of((12, 7)), correlated_inputs(7)
    x[:, 3:] = 0
    spectrum = whitened_spectrum(weight, axes_of(x))
    assert spectrum.method == "whitened"
    assert torch.allclose(product(spectrum, weight, 7), weight, atol=1e-8)
    assert torch.allclose(x @ product(spectrum, weight, 3).T, x @ weight.T, atol=1e-3 * x.norm().item())


@pytest.mark.parametrize(
    "moment",
    [None, torch.zeros(7, 7, dtype=torch.float64), torch.full((7, 7), float("nan"), dtype=torch.float64)],
    ids=["missing", "zero", "not finite"],
)
def test_without_a_usable_moment_the_factors_are_plain_and_say_why(moment: Tensor | None) -> None:
    weight = weight_of((12, 7))
    spectrum = whitened_spectrum(weight, PrincipalAxes.of(moment))
    assert spectrum.method == "plain"
    assert spectrum.note.startswith("plain: ")
    assert torch.allclose(product(spectrum, weight, 3), product(plain_spectrum(weight), weight, 3))
