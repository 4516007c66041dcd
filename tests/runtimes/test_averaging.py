"""The mean of states: of factored layers in the product, of all else entry by entry."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasi_export.errors import UsageError
from wasi_export.runtimes.averaging import average_weights


def state(rng, out_features=9, in_features=7, rank=3):
    left, _ = np.linalg.qr(rng.standard_normal((out_features, rank)))
    return {
        "fc.left": left.astype(np.float32),
        "fc.right": rng.standard_normal((rank, in_features)).astype(np.float32),
        "fc.bias": rng.standard_normal(out_features).astype(np.float32),
    }


def product(weights):
    return weights["fc.left"].astype(np.float64) @ weights["fc.right"]


def test_the_mean_of_one_state_is_that_state_to_the_bit(rng):
    only = state(rng)
    found = average_weights([only], [3.0])
    assert all(np.array_equal(found[name], only[name]) for name in only)
    found["fc.bias"] += 1
    assert not np.array_equal(found["fc.bias"], only["fc.bias"])


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), count=st.integers(2, 5), rank=st.integers(1, 7))
def test_the_product_is_the_best_of_its_rank_to_the_mean_of_products(seed, count, rank):
    rng = np.random.default_rng(seed)
    states = [state(rng, rank=rank) for _ in range(count)]
    shares = rng.uniform(0.1, 1, count)
    mean = sum(s * product(one) for s, one in zip(shares / shares.sum(), states, strict=True))
    U, S, Vh = np.linalg.svd(mean)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    found = average_weights(states, shares)
    # fp32 factors: some 1e-7 of the norm for each of up to 7 products of a sum
    assert np.abs(product(found) - best).max() < 3e-6 * np.linalg.norm(best)
    np.testing.assert_allclose(found["fc.left"].T @ found["fc.left"], np.eye(rank), atol=1e-5)
    bias = sum(s * one["fc.bias"] for s, one in zip(shares / shares.sum(), states, strict=True))
    np.testing.assert_allclose(found["fc.bias"], bias, atol=1e-6)


def test_other_factors_of_the_same_weight_have_that_weight_as_their_mean(rng):
    first = state(rng)
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    turned = first | {
        "fc.left": (first["fc.left"] @ turn).astype(np.float32),
        "fc.right": (turn.T @ first["fc.right"]).astype(np.float32),
    }
    found = average_weights([first, turned], [1, 1])
    np.testing.assert_allclose(product(found), product(first), atol=1e-6)
    np.testing.assert_allclose(
        found["fc.left"], first["fc.left"], atol=1e-5
    )  # the basis nearest to the first
    naive = (first["fc.left"] + turned["fc.left"]) @ (first["fc.right"] + turned["fc.right"]) / 4
    assert np.abs(naive - product(first)).max() > 0.1  # what averaging factor by factor would give


def test_shares_are_ratios(rng):
    states = [state(rng), state(rng)]
    once, thrice = average_weights(states, [1, 3]), average_weights(states, [25, 75])
    for name in once:
        np.testing.assert_allclose(once[name], thrice[name], atol=1e-6)


def test_a_lone_factor_is_averaged_entry_by_entry(rng):
    states = [{"fc.right": state(rng)["fc.right"]} for _ in range(2)]
    mean = (states[0]["fc.right"] + states[1]["fc.right"]) / 2
    np.testing.assert_allclose(average_weights(states, [1, 1])["fc.right"], mean, atol=1e-6)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([1], "2 states and 1 shares"),
        ([1, -1], "shares must be 0 or more"),
        ([0, 0], "not all 0"),
        ([1, float("nan")], "shares must be"),
    ],
)
def test_shares_that_are_no_weights_are_refused(rng, shares, message):
    with pytest.raises(UsageError, match=message):
        average_weights([state(rng), state(rng)], shares)


def test_states_of_different_models_are_refused(rng):
    with pytest.raises(UsageError, match="different models"):
        average_weights([state(rng), state(rng, rank=2)], [1, 1])
