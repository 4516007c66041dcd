"""The Tucker form of an activation, and bases that follow it."""

import pytest
import torch
from torch import Tensor

from wasi_export.subspace.tucker import (
    Bases,
    batch_basis,
    compress,
    follow,
    orthonormalize,
    reconstruct,
    token_count,
)


def activation(tokens: int = 6, width: int = 8, batch: int = 5, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, width, dtype=torch.float64, generator=generator)
    if rank is not None:
        x = x @ torch.randn(width, rank, dtype=x.dtype, generator=generator)
        x = x @ torch.randn(rank, width, dtype=x.dtype, generator=generator)
    return x


def start(size: int, rank: int) -> Tensor:
    return torch.eye(size, rank, dtype=torch.float64)


def test_orthonormal_columns_keep_their_direction() -> None:
    matrix = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = orthonormalize(matrix)
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=basis.dtype), atol=1e-12)
    assert (basis[:, 0] @ matrix[:, 0]) > 0
    assert torch.allclose(orthonormalize(basis), basis, atol=1e-12)


@pytest.mark.parametrize("bases", [Bases(), Bases(start(8, 8)), Bases(start(8, 8), start(6, 6))])
def test_full_ranks_are_exact(bases: Bases) -> None:
    x = activation()
    assert torch.allclose(reconstruct(compress(x, moved := follow(x, bases)), moved), x, atol=1e-10)


def test_one_step_is_enough_for_an_activation_of_that_rank() -> None:
    x = activation(rank=3)
    bases = follow(x, Bases(start(8, 3)))
    core = compress(x, bases)
    assert core.shape == (5, 6, 3)
    assert torch.allclose(reconstruct(core, bases), x, atol=1e-9)


def test_the_basis_converges_to_the_leading_directions() -> None:
    x, bases = activation(), Bases(start(8, 3))
    for _ in range(200):
        bases = follow(x, bases)
    core = compress(x, bases)
    best = torch.linalg.svdvals(x.reshape(-1, 8))[3:].norm()
    assert (x - reconstruct(core, bases)).norm() == pytest.approx(best.item(), rel=1e-3)


def test_both_modes_shrink_the_core() -> None:
    bases = follow(activation(), Bases(start(8, 3), start(6, 2)))
    core = compress(activation(), bases)
    assert core.shape == (5, 2, 3)
    assert reconstruct(core, bases).shape == (5, 6, 8)


def test_the_batch_size_may_change_from_step_to_step() -> None:
    bases = Bases(start(8, 3), start(6, 2))
    for batch in (5, 1, 7):
        bases = follow(activation(batch=batch), bases)
        assert compress(activation(batch=batch), bases).shape == (batch, 2, 3)


def test_a_new_token_count_starts_a_new_token_basis() -> None:
    bases = Bases(None, start(6, 2))
    assert not bases.fit(activation(tokens=9))
    bases = follow(activation(tokens=9), bases)
    assert bases.token is not None
    assert bases.token.shape == (9, 2)
    assert bases.fit(activation(tokens=9))
    assert compress(activation(tokens=9), bases).shape == (5, 2, 8)


def test_images_and_plain_batches_work_in_the_feature_mode() -> None:
    for shape in [(5, 8), (2, 3, 4, 8)]:
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        bases = follow(x, Bases(start(8, 8)))
        assert torch.allclose(reconstruct(compress(x, bases), bases), x, atol=1e-10)


def test_the_batch_basis_keeps_the_most_that_so_many_directions_can() -> None:
    x = activation(batch=7)
    bases = Bases(batch=batch_basis(x, 3))
    core = compress(x, bases)
    assert core.shape == (3, 6, 8)
    best = torch.linalg.svdvals(x.reshape(7, -1))[3:].norm()
    torch.testing.assert_close((x - reconstruct(core, bases)).norm(), best)


def test_equal_samples_need_one_direction() -> None:
    x = activation(batch=1).expand(5, -1, -1)
    bases = Bases(batch=batch_basis(x, 1))
    torch.testing.assert_close(reconstruct(compress(x, bases), bases), x)


def test_a_batch_basis_has_no_more_columns_than_samples() -> None:
    assert batch_basis(activation(batch=2), 5).shape == (2, 2)


def test_the_pixels_of_an_image_are_tokens() -> None:
    x = activation(tokens=6)
    image = x.reshape(5, 2, 3, 8)
    assert token_count(image) == 6
    bases = Bases(start(8, 3), start(6, 2))
    moved, moved_image = follow(x, bases), follow(image, bases)
    assert torch.equal(moved.token, moved_image.token)
    assert torch.equal(compress(x, moved), compress(image, moved))


def test_a_moment_beyond_half_precision_gives_a_basis() -> None:
    """The sum over 10⁴ rows of products of 30 is beyond 65504; their mean is not."""
    x = 30 * torch.randn(10_000, 8, generator=torch.Generator().manual_seed(0)).half()
    basis = follow(x, Bases(torch.eye(8, 3).half())).feature
    assert basis is not None
    torch.testing.assert_close(basis.float().T @ basis.float(), torch.eye(3), atol=2e-3, rtol=0)
