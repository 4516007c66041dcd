"""The gradient of the compressed layer: finite differences, and the exact one at what was kept."""

from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import Tensor

from wasi_export.subspace.autograd import GradientSink, SubspaceLinearFunction, WeightGradient
from wasi_export.subspace.tucker import Bases, compress, reconstruct, token_count

IN, OUT, RANK = 5, 6, 3
SHAPES = {"rows": (7, IN), "tokens": (4, 3, IN), "pixels": (3, 2, 2, IN)}
any_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(size: int, rank: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(size, rank, seed=seed))[0]


def bases_of(x: Tensor, modes: str, *, full: bool) -> Bases:
    """Returns random bases of the named modes, of full rank or of one less."""
    sizes = {"feature": IN, "token": token_count(x), "batch": len(x)}
    return Bases(
        **{
            mode: basis(size, size if full else max(1, size - 1))
            for mode, size in sizes.items()
            if mode in modes
        }
    )


def run(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    bases: Bases,
    sink: GradientSink | None = None,
) -> Tensor:
    core = compress(x.detach(), bases)
    y = SubspaceLinearFunction.apply(
        x, left, right, bias, core, bases.feature, bases.token, bases.batch, sink
    )
    return cast(Tensor, y)


MODES = ("none", "feature", "token", "batch", "feature+token", "feature+token+batch")


@any_shape
@pytest.mark.parametrize("modes", MODES)
def test_gradients_equal_finite_differences_at_full_ranks(shape: tuple[int, ...], modes: str) -> None:
    x = normal(*shape, seed=1).requires_grad_()
    factors = (normal(OUT, RANK, seed=2), normal(RANK, IN, seed=3), normal(OUT, seed=4))
    bases = bases_of(x, modes, full=True)
    inputs = (x, *(factor.requires_grad_() for factor in factors))
    assert torch.autograd.gradcheck(lambda *given: run(*given, bases), inputs)


def test_finite_differences_find_a_basis_that_is_not_full() -> None:
    x = normal(4, 3, IN, seed=1)
    inputs = (x, normal(OUT, RANK, seed=2).requires_grad_(), normal(RANK, IN, seed=3).requires_grad_(), None)
    bases = bases_of(x, "feature", full=False)
    assert not torch.autograd.gradcheck(lambda *given: run(*given, bases), inputs, raise_exception=False)


@any_shape
@pytest.mark.parametrize("modes", MODES)
def test_the_gradient_is_that_at_the_reconstructed_input(shape: tuple[int, ...], modes: str) -> None:
    x, upstream = normal(*shape, seed=1).requires_grad_(), normal(*shape[:-1], OUT, seed=5)
    left, right = normal(OUT, RANK, seed=2).requires_grad_(), normal(RANK, IN, seed=3).requires_grad_()
    bias = normal(OUT, seed=4).requires_grad_()
    bases = bases_of(x, modes, full=False)
    found = torch.autograd.grad(run(x, left, right, bias, bases), (x, left, right, bias), upstream)

    kept = reconstruct(compress(x.detach(), bases), bases).reshape(shape)
    expected = torch.autograd.grad(kept @ right.T @ left.T + bias, (left, right, bias), upstream)
    torch.testing.assert_close(found[0], upstream @ left.detach() @ right.detach())
    for mine, theirs in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@dataclass
class Sink:
    weight_gradient: WeightGradient | None = None


def dense(gradient: WeightGradient | None) -> Tensor:
    assert gradient is not None
    return gradient.coefficients @ gradient.basis.T


def collect(sink: Sink, bases: Bases, seed: int) -> Tensor:
    """Adds the gradient of one backward pass to a sink, in place; returns the dense one at what was kept."""
    x, upstream = normal(4, 3, IN, seed=seed), normal(4, 3, OUT, seed=seed + 1)
    left, right = normal(OUT, RANK, seed=2).requires_grad_(), normal(RANK, IN, seed=3).requires_grad_()
    grads = torch.autograd.grad(
        run(x, left, right, None, bases, sink), (left, right), upstream, allow_unused=True
    )
    assert grads == (None, None)
    return upstream.reshape(-1, OUT).T @ reconstruct(compress(x, bases), bases).reshape(-1, IN)


@pytest.mark.parametrize("modes", ["feature", "feature+token", "feature+token+batch"])
def test_a_sink_gets_the_gradient_of_the_weight(modes: str) -> None:
    sink, bases = Sink(), bases_of(normal(4, 3, IN, seed=0), modes, full=False)
    expected = collect(sink, bases, seed=10)
    torch.testing.assert_close(dense(sink.weight_gradient), expected)
    assert sink.weight_gradient is not None
    torch.testing.assert_close(sink.weight_gradient.coefficients.norm(), expected.norm())


@pytest.mark.parametrize("moves", [False, True], ids=["at rest", "moved"])
def test_several_backward_passes_add_up_whether_or_not_the_basis_moved(moves: bool) -> None:
    sink, bases, total = Sink(), Bases(basis(IN, 2)), torch.zeros(OUT, IN, dtype=torch.float64)
    for seed in (10, 20, 30):
        if moves:
            bases = Bases(basis(IN, 2, seed=seed))
        total += collect(sink, bases, seed=seed)
    torch.testing.assert_close(dense(sink.weight_gradient), total)
    assert sink.weight_gradient is not None
    U = sink.weight_gradient.basis
    assert U.shape == (IN, IN if moves else 2)  # never more columns than the weight
    torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=U.dtype))
    torch.testing.assert_close(sink.weight_gradient.coefficients.norm(), total.norm())


@pytest.mark.parametrize("modes", ["none", "feature", "feature+token"])
@pytest.mark.parametrize("collects", [False, True])
def test_backward_under_autocast_computes_as_forward_did(modes: str, collects: bool) -> None:
    """Autograd runs backward outside the region; gradients are fp32, as the factors are."""
    if collects and modes == "none":
        pytest.skip("a sink needs a feature basis")
    x, upstream = normal(4, 3, IN, seed=1).float().requires_grad_(), normal(4, 3, OUT, seed=5)
    left, right = (normal(*s, seed=2).float().requires_grad_() for s in ((OUT, RANK), (RANK, IN)))
    bases = bases_of(x, modes, full=True)
    bases = Bases(*(None if b is None else b.float() for b in (bases.feature, bases.token)))
    sink = Sink() if collects else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(x, left, right, None, bases, sink)
    assert y.dtype is torch.bfloat16
    y.backward(upstream.bfloat16())
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    X, dY = x.detach().reshape(-1, IN).double(), upstream.reshape(-1, OUT)
    if sink is not None and sink.weight_gradient is not None:
        assert sink.weight_gradient.coefficients.dtype is torch.float32
        expected, found = dY.T @ X, dense(sink.weight_gradient).double()
    else:
        assert left.grad is not None
        expected, found = dY.T @ X @ right.detach().double().T, left.grad.double()
    # bf16 has 8 bits: one rounding is 4e-3.
    assert float((found - expected).norm() / expected.norm()) < 0.02
