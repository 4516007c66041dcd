"""One option of every group under several limits at once: the multiple-choice knapsack.

    minimise    Σ_g loss[g, c_g]
    subject to  Σ_g cost[g, c_g, r] ≤ limit[r]     for every resource r, one option c_g of every group g

It is solved as an integer programme, one 0/1 variable an option, by HiGHS through scipy, until the loss is
proven to be within 0.1 % of the smallest; the limits are kept exactly. An option that is neither better in
loss nor in any cost than another of its group is in no best choice and is left out first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wasi_export._extras import require
from wasi_export.errors import RankError

RELATIVE_GAP = 1e-3  # 48 layers × 70 ranks take 0.2 s, at worst 1 s; the last of the gap can take minutes
ROUNDING = 1e-12  # relative, of a sum of some hundred doubles


@dataclass(frozen=True)
class Option:
    """What one choice of a group loses, and what it costs of each limited resource."""

    loss: float
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Limit:
    """The most that all choices together may cost of one resource."""

    amount: float
    unit: str
    """As read after a number: `parameters`, `ms`."""
    taken: float = 0.0
    """What is used of it whatever is chosen."""


def choose_options(groups: Sequence[Sequence[Option]], limits: Sequence[Limit]) -> tuple[int, ...]:
    """Returns the index of the chosen option of each group: the least total loss within all limits.

    Args:
        groups: the options of each group; none is empty. Without groups nothing is chosen.
        limits: in the order of the options' costs.

    Raises:
        RankError: no choice meets the limits; the message has the smallest figures that can be met.
    """
    table = _Table.of(groups, len(limits))
    amounts = np.array([limit.amount - limit.taken for limit in limits], np.float64)
    rows = _solve(table, table.loss, amounts)
    if rows is None:
        raise RankError(_what_is_needed(table, limits, amounts))
    return tuple(table.index[rows].tolist())


@dataclass(frozen=True)
class _Table:
    """The options of all groups as rows, in order, without those that another of their group dominates."""

    loss: NDArray[np.float64]
    """[n]"""
    costs: NDArray[np.float64]
    """[n, resources]"""
    group: NDArray[np.intp]
    """[n], which group a row belongs to."""
    index: NDArray[np.intp]
    """[n], which option of the group it is."""

    @classmethod
    def of(cls, groups: Sequence[Sequence[Option]], resources: int) -> "_Table":
        rows = [(g, i) for g, options in enumerate(groups) for i in _undominated(options)]
        kept = [groups[g][i] for g, i in rows]
        group, index = np.array(rows, np.intp).reshape(-1, 2).T
        costs = np.array([option.costs for option in kept], np.float64).reshape(len(kept), resources)
        return cls(np.array([option.loss for option in kept], np.float64), costs, group, index)


def _undominated(options: Sequence[Option]) -> list[int]:
    """Returns the options that no other equals or beats in everything; of equal ones the first."""
    values = np.array([(option.loss, *option.costs) for option in options], np.float64)
    no_worse = (values[None] <= values[:, None]).all(2)  # [i, j]: j is nowhere worse than i
    earlier = np.tri(len(options), k=-1, dtype=bool)
    beaten = (no_worse & (~no_worse.T | earlier)).any(1)
    return np.flatnonzero(~beaten).tolist()


def _solve(table: _Table, loss: NDArray[np.float64], amounts: NDArray[np.float64]) -> NDArray[np.intp] | None:
    """Returns the rows of least total loss within the amounts, one a group; None where there are none."""
    # Over the cheapest option of each group, so that small differences of large costs are not rounded away.
    least = _least_by_group(table)
    slack = amounts - least.sum(0) + ROUNDING * np.abs(amounts)
    extra = table.costs - least[table.group]
    rows = np.flatnonzero((extra <= slack).all(1))  # the others are in no choice
    if (slack < 0).any() or len(np.unique(table.group[rows])) < len(least):
        return None
    if not len(rows):
        return rows
    solution = _programme(loss[rows], table.group[rows], extra[rows], slack)
    return None if solution is None else rows[solution]


def _programme(
    loss: NDArray[np.float64],
    group: NDArray[np.intp],
    costs: NDArray[np.float64],
    amounts: NDArray[np.float64],
) -> NDArray[np.intp] | None:
    """Returns the rows chosen by the integer programme; None where it has no solution."""
    groups, n = int(group[-1]) + 1, len(loss)
    optimize, sparse = (require(f"scipy.{name}", extra="train") for name in ("optimize", "sparse"))
    # The solver's absolute gap of 1e-6 is not to matter, whatever the unit of the loss.
    span = float(np.ptp(loss))
    loss = (loss - loss.min()) * (1e6 / span if span > 0 else 1.0)
    one_each = sparse.csr_array((np.ones(n), (group, np.arange(n))), shape=(groups, n))
    limited = np.flatnonzero(np.isfinite(amounts) & (costs > 0).any(0))
    shares = costs[:, limited] / amounts[limited]
    allowed = np.ones(len(limited))
    while True:
        constraints = [optimize.LinearConstraint(one_each, 1, 1)]
        if len(limited):
            constraints.append(optimize.LinearConstraint(shares.T, -np.inf, allowed))
        found = optimize.milp(
            loss,
            integrality=np.ones(n),
            bounds=optimize.Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": RELATIVE_GAP},
        )
        if found.x is None:
            return None
        rows: NDArray[np.intp] = np.flatnonzero(found.x > 0.5)
        excess = shares[rows].sum(0) - 1
        if (excess <= ROUNDING).all():
            return rows
        # The solver passes up to 1e-6 over a limit; ours is a promise, so the same again with that much less.
        allowed = allowed - 2 * np.maximum(excess, 0)


def _least_by_group(table: _Table) -> NDArray[np.float64]:
    """Returns the smallest cost of each resource in each group; [groups, resources]."""
    least = np.full((int(table.group.max(initial=-1)) + 1, table.costs.shape[1]), np.inf)
    np.minimum.at(least, table.group, table.costs)
    return least


def _what_is_needed(table: _Table, limits: Sequence[Limit], amounts: NDArray[np.float64]) -> str:
    """Returns why no choice meets the limits, with the smallest figure of each that does."""
    least = _least_by_group(table).sum(0)
    alone = [
        f"at least {_figure(low + limit.taken)} {limit.unit} are needed, got {_figure(limit.amount)}"
        for limit, low, amount in zip(limits, least, amounts, strict=True)
        if low > amount + ROUNDING * abs(amount)
    ]
    if alone:
        return "; ".join(alone)
    given = " and ".join(f"{_figure(limit.amount)} {limit.unit}" for limit in limits)
    needed = []
    for r, limit in enumerate(limits):
        others = amounts.copy()
        others[r] = np.inf
        rows = _solve(table, table.costs[:, r], others)
        if rows is not None:
            needed.append(f"{_figure(limit.taken + float(table.costs[rows, r].sum()))} {limit.unit}")
    alternatives = f": with the others as they are, allow {' or '.join(needed)}" if needed else ""
    return f"{given} cannot be met together{alternatives}"


def _figure(amount: float) -> str:
    """Returns an amount, whole numbers with all digits, others rounded up to four decimals."""
    return f"{amount:,.0f}" if float(amount).is_integer() else f"{math.ceil(amount * 1e4) / 1e4:,.4f}"
