"""What holds for every weight, input and rank: factors, Tucker forms, steps on factors."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wasi_export.subspace.factorize import plain_spectrum, whitened_spectrum
from wasi_export.subspace.moments import PrincipalAxes
from wasi_export.subspace.tucker import Bases, batch_basis, compress, follow, orthonormalize, reconstruct
from wasi_export.subspace.update import project_step, truncate_step

SMALL = st.integers(1, 12)
SEEDS = st.integers(0, 10_000)
ROUNDING = 1e-9
"""Of fp64 sums of some hundred terms, relative to their norm."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(rows: int, columns: int, *, seed: int) -> Tensor:
    return orthonormalize(normal(rows, columns, seed=seed))


def close(one: Tensor, other: Tensor, scale: Tensor | None = None) -> bool:
    size = float((other if scale is None else scale).norm())
    return float((one - other).norm()) <= ROUNDING * max(size, 1e-300)


def factors(spectrum, weight, rank):
    """Returns the leading directions and the best match for them, as a layer gets them, but in fp64."""
    left = spectrum.basis[:, :rank]
    return left, left.T @ weight


@st.composite
def weights(draw):
    return normal(draw(SMALL), draw(SMALL), seed=draw(SEEDS))


@given(weights(), st.integers(1, 12))
def test_plain_factors_have_the_smallest_error_of_their_rank(weight, rank):
    """Eckart-Young: the norm of the singular values behind the rank."""
    left, right = factors(plain_spectrum(weight), weight, rank)
    behind = torch.linalg.svdvals(weight)[rank:]
    assert float((weight - left @ right).norm()) == pytest.approx(
        float(behind.norm()), abs=ROUNDING * float(weight.norm())
    )


@given(weights(), st.integers(1, 12), SEEDS)
def test_whitened_factors_have_the_smallest_error_of_the_output(weight, rank, seed):
    """Of the outputs W·X over the inputs X that gave the moment X·Xᵀ."""
    inputs = normal(weight.shape[1], 20, seed=seed)
    spectrum = whitened_spectrum(weight, PrincipalAxes.of(inputs @ inputs.T))
    left, right = factors(spectrum, weight, rank)
    error = float((weight @ inputs - left @ right @ inputs).norm())
    behind = float(torch.linalg.svdvals(weight @ inputs)[rank:].norm())
    assert error == pytest.approx(behind, abs=1e-6 * float((weight @ inputs).norm()))


@given(weights(), st.integers(1, 12), SEEDS)
def test_no_other_factors_of_the_rank_are_nearer_to_the_output(weight, rank, seed):
    inputs = normal(weight.shape[1], 20, seed=seed)
    spectrum = whitened_spectrum(weight, PrincipalAxes.of(inputs @ inputs.T))
    left, right = factors(spectrum, weight, rank)
    other_left = basis(weight.shape[0], min(rank, weight.shape[0]), seed=seed + 1)
    other = other_left @ (other_left.T @ weight)
    own = float((weight @ inputs - left @ right @ inputs).norm())
    assert own <= float((weight @ inputs - other @ inputs).norm()) + 1e-6 * float((weight @ inputs).norm())


@given(weights(), SEEDS)
def test_factors_of_full_rank_are_the_weight(weight, seed):
    inputs = normal(weight.shape[1], 20, seed=seed)
    for spectrum in (plain_spectrum(weight), whitened_spectrum(weight, PrincipalAxes.of(inputs @ inputs.T))):
        left, right = factors(spectrum, weight, min(weight.shape))
        assert close(left @ right, weight)


@given(weights(), SEEDS, st.floats(1e-3, 1e3))
def test_the_factors_of_a_scaled_weight_are_the_scaled_factors(weight, seed, scale):
    rank = max(1, min(weight.shape) // 2)
    scaled = [factor * weight for factor in (1, scale)]
    products = [torch.mm(*factors(plain_spectrum(w), w, rank)) for w in scaled]
    assert close(products[1], scale * products[0], scale * weight * 1e3)


@given(st.integers(1, 12), st.integers(1, 12), SEEDS)
def test_an_orthonormal_basis_spans_the_columns_and_keeps_their_direction(rows, columns, seed):
    matrix = normal(rows, min(rows, columns), seed=seed)
    Q = orthonormalize(matrix)
    assert close(Q.T @ Q, torch.eye(Q.shape[1], dtype=Q.dtype))
    assert close(Q @ (Q.T @ matrix), matrix)
    assert float(torch.diagonal(Q.T @ matrix).min()) >= 0


@st.composite
def compressed(draw):
    """Inputs (B, N, I), and bases of some of their modes."""
    B, N, I = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    x = normal(B, N, I, seed=draw(SEEDS))
    ranks = [draw(st.none() | st.integers(1, size)) for size in (I, N, B)]
    made = [
        None if r is None else basis(n, r, seed=i)
        for i, (n, r) in enumerate(zip((I, N, B), ranks, strict=True))
    ]
    return x, Bases(*made)


@given(compressed())
def test_a_tucker_form_is_a_projection(case):
    """What was compressed once is the same when it is compressed again, and is never larger."""
    x, bases = case
    core = compress(x, bases)
    once = reconstruct(core, bases)
    assert close(compress(once, bases), core, x)
    assert close(reconstruct(compress(once, bases), bases), once, x)
    assert float(once.norm()) <= float(x.norm()) * (1 + ROUNDING)
    assert float(core.norm()) == pytest.approx(float(once.norm()), abs=ROUNDING * float(x.norm()))


@given(compressed())
def test_what_a_tucker_form_leaves_out_is_at_right_angles_to_it(case):
    x, bases = case
    kept = reconstruct(compress(x, bases), bases)
    assert abs(float(((x - kept) * kept).sum())) <= ROUNDING * float(x.square().sum())


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), SEEDS)
def test_more_columns_of_a_basis_leave_less_out(batch, tokens, d_in, seed):
    x, U = normal(batch, tokens, d_in, seed=seed), basis(d_in, d_in, seed=seed + 1)
    errors = []
    for rank in range(1, d_in + 1):
        bases = Bases(feature=U[:, :rank].contiguous())
        errors.append(float((x - reconstruct(compress(x, bases), bases)).norm()))
    assert all(after <= before + ROUNDING * float(x.norm()) for before, after in pairwise(errors))
    assert errors[-1] <= ROUNDING * float(x.norm())


@given(compressed())
def test_bases_stay_orthonormal_when_they_follow(case):
    x, bases = case
    moved = follow(x, Bases(bases.feature, bases.token))
    for U in (moved.feature, moved.token):
        if U is not None:
            assert close(U.T @ U, torch.eye(U.shape[1], dtype=U.dtype))


@given(st.integers(2, 4), st.integers(2, 5), st.integers(1, 3), SEEDS)
def test_a_basis_that_follows_inputs_of_its_rank_holds_all_of_them(batch, tokens, rank, seed):
    """One round is enough where nothing is to be left out."""
    x = normal(batch, tokens, rank, seed=seed) @ normal(rank, 6, seed=seed + 1)
    bases = follow(x, Bases(feature=basis(6, min(rank, batch * tokens), seed=seed + 2)))
    assert float((x - reconstruct(compress(x, bases), bases)).norm()) <= 1e-6 * float(x.norm())


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 8), SEEDS)
def test_the_basis_of_a_batch_leaves_out_the_least(batch, size, rank, seed):
    core = normal(batch, size, seed=seed)
    U = batch_basis(core, rank)
    behind = torch.linalg.svdvals(core)[min(rank, batch) :]
    error = float((core - U @ (U.T @ core)).norm())
    assert error == pytest.approx(float(behind.norm()), abs=1e-6 * float(core.norm()))


@st.composite
def steps(draw):
    """Factors of rank K, a change of rank r in its two factors, and the scale of the old weight."""
    O, I = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    K, r, seed = draw(st.integers(1, min(O, I))), draw(st.integers(1, 6)), draw(SEEDS)
    left, right = basis(O, K, seed=seed), normal(K, I, seed=seed + 1)
    return left, right, normal(O, r, seed=seed + 2), normal(I, r, seed=seed + 3), draw(st.floats(0.1, 1.0))


@given(steps())
def test_a_step_on_the_factors_is_a_projection_of_the_dense_step(case):
    left, right, change, direction, scale = case
    dense = scale * left @ right + change @ direction.T
    new_left, new_right = project_step(left, right, change, direction, scale=scale)
    assert close(new_left.T @ new_left, torch.eye(left.shape[1], dtype=left.dtype))
    assert close(new_left @ new_right, new_left @ (new_left.T @ dense), dense)


@given(steps())
def test_a_refreshed_step_is_the_best_of_its_rank(case):
    left, right, change, direction, scale = case
    dense = scale * left @ right + change @ direction.T
    best = torch.mm(*truncate_step(left, right, change, direction, scale=scale))
    behind = float(torch.linalg.svdvals(dense)[left.shape[1] :].norm())
    assert float((dense - best).norm()) == pytest.approx(behind, abs=ROUNDING * float(dense.norm()))
    round_error = float((dense - torch.mm(*project_step(left, right, change, direction, scale=scale))).norm())
    assert round_error >= behind - ROUNDING * float(dense.norm())


@given(steps())
def test_a_step_of_nothing_leaves_the_weight_as_it_is(case):
    left, right, change, direction, _ = case
    for move in (project_step, truncate_step):
        assert close(torch.mm(*move(left, right, 0 * change, direction)), left @ right)
