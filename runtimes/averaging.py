"""Several states of one model → their weighted mean, as in federated learning.

A factored weight is a product, and the mean of products is not the product of means: two boards may have the
same weight with other factors. So the products are averaged, in factored form,

    Σ sᵢ·Lᵢ·Rᵢ = [L₁ … Lₙ]·[s₁·R₁; …; sₙ·Rₙ]

and cut back to the rank K of a pair: QR of both sides, SVD of the small matrix between them. Of all bases the
one nearest to L₁ is taken. All else is averaged entry by entry.

Source: McMahan et al., arXiv 1602.05629 (weights by number of images); the best rank-K approximation of a
product is that of its small core.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from wasi_export.errors import UsageError

Weights = Mapping[str, NDArray[np.float32]]


def average_weights(states: Sequence[Weights], shares: Sequence[float]) -> dict[str, NDArray[np.float32]]:
    """Returns the mean of states that have the same names and shapes; of one state, that state.

    Args:
        states: parameters by name; `X.left` [O, K] and `X.right` [K, I] are a pair.
        shares: of each state, at least 0; only their ratios count.

    Raises:
        UsageError: there is no state, a share is negative or all are 0, or states differ in names or shapes.
    """
    if not states or len(states) != len(shares):
        raise UsageError(f"{len(states)} states and {len(shares)} shares: give one share for each state")
    if min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UsageError(f"shares must be 0 or more, and not all 0, got {', '.join(map(str, shares))}")
    shapes = [{name: array.shape for name, array in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes[1:]):
        raise UsageError("the states are of different models: their names or shapes differ")
    s = [share / sum(shares) for share in shares]
    if len(states) == 1:
        return {name: array.copy() for name, array in states[0].items()}
    means = {
        name: sum(share * state[name].astype(np.float64) for share, state in zip(s, states, strict=True))
        for name in states[0]
    }
    for name in means:
        layer = name.removesuffix(".left")
        if layer != name and f"{layer}.right" in means:
            right = f"{layer}.right"
            means[name], means[right] = _average_pairs(
                [state[name] for state in states], [state[right] for state in states], s
            )
    return {name: np.asarray(mean, np.float32) for name, mean in means.items()}


def _average_pairs(
    lefts: Sequence[NDArray[np.float32]], rights: Sequence[NDArray[np.float32]], shares: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns left [O, K] and right [K, I] of the best approximation of the mean product."""
    first = lefts[0].astype(np.float64)
    rank = first.shape[1]
    wide = np.concatenate(lefts, 1).astype(np.float64)
    tall = np.concatenate([share * right for share, right in zip(shares, rights, strict=True)])
    Q1, T1 = np.linalg.qr(wide)
    Q2, T2 = np.linalg.qr(tall.T.astype(np.float64))
    U, S, Vh = np.linalg.svd(T1 @ T2.T)
    left, right = Q1 @ U[:, :rank], (S[:rank, None] * Vh[:rank]) @ Q2.T
    U, _, Vh = np.linalg.svd(left.T @ first)  # the rotation that brings left nearest to the first one
    return left @ (U @ Vh), (U @ Vh).T @ right
