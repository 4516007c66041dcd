"""`left` stays orthonormal, the weight stays the same, and the optimiser's state comes along."""

from collections.abc import Callable

import pytest
import timm.optim
import torch
from torch import Tensor

from wasi_export.errors import ConfigError
from wasi_export.subspace.gauge import GAUGED_OPTIMIZERS, GaugeFix, fix_gauge
from wasi_export.subspace.linear import SubspaceLinear

IN, OUT, RANK = 9, 11, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(left: Tensor | None = None, right: Tensor | None = None) -> SubspaceLinear:
    layer = SubspaceLinear(IN, OUT, RANK, bias=False).double()
    layer.left.data = (normal(OUT, RANK, seed=0) if left is None else left).clone()
    layer.right.data = (normal(RANK, IN, seed=1) if right is None else right).clone()
    return layer


def product(layer: SubspaceLinear) -> Tensor:
    return (layer.left @ layer.right).detach()


def identity() -> Tensor:
    return torch.eye(RANK, dtype=torch.float64)


def test_the_fixed_pair_is_the_same_weight_with_an_orthonormal_left() -> None:
    layer = make()
    left, right, M = fix_gauge(layer.left.detach(), layer.right.detach())
    torch.testing.assert_close(left.T @ left, identity(), atol=1e-12, rtol=0)
    torch.testing.assert_close(left @ right, product(layer), atol=1e-12, rtol=0)
    torch.testing.assert_close(left @ M, layer.left.detach(), atol=1e-12, rtol=0)


def test_a_pair_in_the_gauge_stays_as_it_is() -> None:
    left, right, _ = fix_gauge(normal(OUT, RANK, seed=0), normal(RANK, IN, seed=1))
    again, right_again, M = fix_gauge(left, right)
    torch.testing.assert_close(again, left, atol=1e-12, rtol=0)
    torch.testing.assert_close(right_again, right, atol=1e-12, rtol=0)
    torch.testing.assert_close(M, identity(), atol=1e-12, rtol=0)


def gradients_of_factors(layer: SubspaceLinear, gradient: Tensor) -> None:
    """Sets the gradients that the factors have where the weight has this one, in place."""
    layer.left.grad = gradient @ layer.right.detach().T
    layer.right.grad = layer.left.detach().T @ gradient


def states_in_both_gauges(
    make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    layer: SubspaceLinear,
    opt: str,
) -> list[list[dict[str, Tensor]]]:
    """Returns the states of left and right carried over to the gauge, and those of steps that were in it.

    The rate is 0, so that the factors are the same in all steps, and only the gauge is different.
    """
    inside = make(*fix_gauge(layer.left.detach(), layer.right.detach())[:2])
    states = []
    for pair in (layer, inside):
        optimizer = make_optimizer([pair.left, pair.right])
        if pair is layer:
            GaugeFix({"fc": layer}, opt, period=5).attach(optimizer)
        for seed in range(5):
            gradients_of_factors(pair, normal(OUT, IN, seed=seed + 10))
            optimizer.step()
        states.append([optimizer.state[pair.left], optimizer.state[pair.right]])
    return states


def test_the_momentum_is_that_of_gradients_in_the_new_gauge() -> None:
    layer = make()
    carried, direct = states_in_both_gauges(
        lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=0.9), layer, "sgd"
    )
    torch.testing.assert_close(layer.left.detach().T @ layer.left.detach(), identity(), atol=1e-12, rtol=0)
    for mine, theirs in zip(carried, direct, strict=True):
        torch.testing.assert_close(mine["momentum_buffer"], theirs["momentum_buffer"], atol=1e-10, rtol=0)


def test_the_first_moment_is_exact_and_the_second_stays_positive() -> None:
    carried, direct = states_in_both_gauges(
        lambda parameters: torch.optim.AdamW(parameters, lr=0.0), make(), "adamw"
    )
    for mine, theirs in zip(carried, direct, strict=True):
        torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"], atol=1e-12, rtol=0)
        assert (mine["exp_avg_sq"] > 0).all()
        assert not torch.allclose(mine["exp_avg_sq"], theirs["exp_avg_sq"])  # products were not kept


def test_the_second_moment_is_exact_where_columns_only_change_their_length() -> None:
    left, _ = torch.linalg.qr(normal(OUT, RANK, seed=0))
    layer = make(left * torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=left.dtype))
    carried, direct = states_in_both_gauges(
        lambda parameters: torch.optim.AdamW(parameters, lr=0.0), layer, "adamw"
    )
    for mine, theirs in zip(carried, direct, strict=True):
        torch.testing.assert_close(mine["exp_avg_sq"], theirs["exp_avg_sq"], atol=1e-12, rtol=1e-9)


def train(layer: SubspaceLinear, optimizer: torch.optim.Optimizer, steps: int = 40) -> Tensor:
    x, target = normal(50, IN, seed=5), normal(50, OUT, seed=6)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    return product(layer)


def sgd(layer: SubspaceLinear) -> torch.optim.Optimizer:
    return torch.optim.SGD(layer.parameters(), lr=0.2, momentum=0.9)


@pytest.mark.parametrize("period", [1, 8])
def test_sgd_trains_every_pair_of_a_weight_alike_once_it_is_in_the_gauge(period: int) -> None:
    left, right = normal(OUT, RANK, seed=0) / 3, normal(RANK, IN, seed=1) / 3
    mixing = normal(RANK, RANK, seed=2) + 2 * identity()
    ends = []
    for pair in ((left, right), (left @ torch.linalg.inv(mixing), mixing @ right)):
        layer = make(*fix_gauge(*pair)[:2])
        optimizer = sgd(layer)
        GaugeFix({"fc": layer}, "sgd", period=period).attach(optimizer)
        ends.append(train(layer, optimizer))
    assert float((ends[0] - left @ right).norm()) > 0.5
    torch.testing.assert_close(ends[0], ends[1], atol=1e-9, rtol=0)


def test_sgd_alone_trains_pairs_of_a_weight_differently() -> None:
    left, right = normal(OUT, RANK, seed=0) / 3, normal(RANK, IN, seed=1) / 3
    ends = [train(layer, sgd(layer)) for layer in (make(left, right), make(left / 2, right * 2))]
    assert float((ends[0] - ends[1]).norm()) > 1e-2


@pytest.mark.parametrize("opt", GAUGED_OPTIMIZERS)
def test_every_accepted_optimizer_keeps_left_orthonormal_and_only_means_as_state(opt: str) -> None:
    layer = make()
    optimizer = timm.optim.create_optimizer_v2([layer.left, layer.right], opt=opt, lr=1e-2, momentum=0.9)
    GaugeFix({"fc": layer}, opt, period=1).attach(optimizer)
    train(layer, optimizer, steps=3)
    torch.testing.assert_close(layer.left.detach().T @ layer.left.detach(), identity(), atol=1e-6, rtol=0)
    assert matrices_in_state(optimizer, layer) <= {"exp_avg", "exp_avg_sq", "momentum_buffer"}


def matrices_in_state(optimizer: torch.optim.Optimizer, layer: SubspaceLinear) -> set[str]:
    state = optimizer.state[layer.left]
    return {name for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}


@pytest.mark.parametrize("opt", ["adamax", "adan", "adabelief"])
def test_the_search_finds_state_that_is_no_mean_in_a_refused_optimizer(opt: str) -> None:
    layer = make()
    optimizer = timm.optim.create_optimizer_v2([layer.left, layer.right], opt=opt, lr=1e-2)
    train(layer, optimizer, steps=2)
    assert matrices_in_state(optimizer, layer) - {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    with pytest.raises(ConfigError, match=rf"does not know that of opt = '{opt}': choose one of adam,"):
        GaugeFix({"fc": layer}, opt)


def test_a_step_without_gradients_of_a_layer_is_not_counted_for_it() -> None:
    layer, other = make(), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([layer.left, layer.right, other], lr=0.1)
    GaugeFix({"fc": layer}, "sgd", period=1).attach(optimizer)
    before = layer.left.detach().clone()
    other.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(layer.left, before)


def test_left_is_orthonormal_after_every_eighth_step() -> None:
    layer = make()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    GaugeFix({"fc": layer}, "adamw").attach(optimizer)
    errors = []
    for _ in range(16):
        train(layer, optimizer, steps=1)
        left = layer.left.detach()
        errors.append(float((left.T @ left - identity()).abs().max()))
    assert max(errors[7::8]) < 1e-12
    assert min(errors[8:15]) > 1e-6
