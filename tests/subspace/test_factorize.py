"""Factors of one weight: optimal, orthonormal, and safe on any moment."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wasi_export.subspace.factorize import Spectrum, plain_spectrum, whitened_spectrum
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


def product(spectrum: Spectrum, rank: int) -> Tensor:
    left, right = spectrum.truncate(rank)
    return left @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_reaches_the_smallest_error_a_rank_can_have(shape: tuple[int, int]) -> None:
    weight = weight_of(shape)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, min(shape) + 1):
        error = (weight - product(plain_spectrum(weight), rank)).norm()
        assert error == pytest.approx(values[rank:].norm().item(), abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_reaches_the_smallest_output_error_a_rank_can_have(shape: tuple[int, int]) -> None:
    weight, x = weight_of(shape), correlated_inputs(shape[1])
    spectrum, outputs = whitened_spectrum(weight, axes_of(x)), x @ weight.T
    values = torch.linalg.svdvals(outputs)
    for rank in range(1, min(shape) + 1):
        error = (outputs - x @ product(spectrum, rank).T).norm()
        assert error == pytest.approx(values[rank:].norm().item(), abs=1e-6 * values[0].item())


@settings(deadline=None, max_examples=40)
@given(d_out=st.integers(1, 20), d_in=st.integers(1, 20), rank=st.integers(1, 20), seed=st.integers(0, 99))
def test_left_is_orthonormal_and_right_its_best_match(d_out: int, d_in: int, rank: int, seed: int) -> None:
    weight, rank = weight_of((d_out, d_in), seed), min(rank, d_out, d_in)
    for spectrum in (plain_spectrum(weight), whitened_spectrum(weight, axes_of(correlated_inputs(d_in)))):
        left, right = spectrum.truncate(rank)
        assert torch.allclose(left.T @ left, torch.eye(rank, dtype=left.dtype), atol=1e-10)
        assert torch.allclose(right, left.T @ weight, atol=1e-10)


def test_a_white_input_makes_whitened_plain() -> None:
    weight = weight_of((12, 7))
    axes = PrincipalAxes.of(3 * torch.eye(7, dtype=torch.float64))
    whitened, plain = whitened_spectrum(weight, axes), plain_spectrum(weight)
    assert whitened.method == "whitened"
    assert torch.allclose(product(whitened, 3), product(plain, 3), atol=1e-10)


def test_a_singular_moment_still_gives_the_whole_weight_at_full_rank() -> None:
    weight, x = weight_of((12, 7)), correlated_inputs(7)
    x[:, 3:] = 0
    spectrum = whitened_spectrum(weight, axes_of(x))
    assert spectrum.method == "whitened"
    assert torch.allclose(product(spectrum, 7), weight, atol=1e-8)
    assert torch.allclose(x @ product(spectrum, 3).T, x @ weight.T, atol=1e-3 * x.norm().item())


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
    assert torch.allclose(product(spectrum, 3), product(plain_spectrum(weight), 3))


def test_factors_have_the_dtype_of_the_weight() -> None:
    left, right = plain_spectrum(weight_of((12, 7)).float()).truncate(3)
    assert left.dtype == right.dtype == torch.float32
