"""The integer programme against a dynamic programme over everything that can be used up."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasi_export.errors import RankError
from wasi_export.knapsack import RELATIVE_GAP, Limit, Option, choose_options

Used = tuple[float, ...]

ROUNDING = 1e-9  # of sums of six losses up to 1


def least_loss(groups: list[list[Option]], limits: list[Limit]) -> float | None:
    """Returns the least total loss within the limits; None where nothing meets them.

    The table holds, group after group, the least loss for each total of costs that is still within the
    limits: exact for any costs that are sums of small integers.
    """
    table: dict[Used, float] = {tuple(limit.taken for limit in limits): 0.0}
    for options in groups:
        reached: dict[Used, float] = {}
        for used, loss in table.items():
            for option in options:
                total = tuple(a + b for a, b in zip(used, option.costs, strict=True))
                if all(t <= limit.amount for t, limit in zip(total, limits, strict=True)):
                    reached[total] = min(loss + option.loss, reached.get(total, np.inf))
        table = reached
    return min(table.values(), default=None)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Option]], list[Limit]]:
    resources = draw(st.integers(1, 3))
    cost = st.integers(0, 12).map(float)
    option = st.builds(
        Option,
        loss=st.integers(0, 1000).map(lambda thousandths: thousandths / 1000),
        costs=st.tuples(*[cost] * resources),
    )
    groups = draw(st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=6))
    limit = st.builds(
        Limit, amount=st.integers(0, 50).map(float), unit=st.just("units"), taken=st.sampled_from([0.0, 3.0])
    )
    return groups, [draw(limit) for _ in range(resources)]


@settings(deadline=None)
@given(problems())
def test_the_choice_is_as_good_as_the_dynamic_programme_finds(
    problem: tuple[list[list[Option]], list[Limit]],
) -> None:
    groups, limits = problem
    best = least_loss(groups, limits)
    if best is None:
        with pytest.raises(RankError):
            choose_options(groups, limits)
        return
    chosen = [options[index] for options, index in zip(groups, choose_options(groups, limits), strict=True)]
    for resource, limit in enumerate(limits):
        assert limit.taken + sum(option.costs[resource] for option in chosen) <= limit.amount
    assert best - ROUNDING <= sum(option.loss for option in chosen) <= best * (1 + RELATIVE_GAP) + ROUNDING


def test_the_dynamic_programme_sees_that_taking_the_best_per_cost_first_is_not_best() -> None:
    """The second group's cheap step is the better bargain, and leaves no room for the larger one."""
    groups = [
        [Option(10.0, (0.0,)), Option(0.0, (6.0,))],
        [Option(8.0, (0.0,)), Option(4.0, (1.0,)), Option(1.0, (6.0,))],
    ]
    limits = [Limit(6.0, "units")]
    assert least_loss(groups, limits) == 8.0
    assert choose_options(groups, limits) == (1, 0)


def test_losses_of_any_size_are_told_apart() -> None:
    for scale in (1e-12, 1.0, 1e12):
        groups = [
            [Option(2 * scale, (1.0,)), Option(scale, (2.0,))],
            [Option(3 * scale, (1.0,)), Option(0, (2.0,))],
        ]
        assert choose_options(groups, [Limit(3.0, "units")]) == (0, 1)


def test_a_limit_is_kept_to_the_last_parameter() -> None:
    """A solver's tolerance of 1e-6 would let a billion parameters be passed by a thousand."""
    groups = [[Option(1.0, (5e8,)), Option(0.0, (5e8 + 1,))] for _ in range(2)]
    assert choose_options(groups, [Limit(1e9, "parameters")]) == (0, 0)
    assert sorted(choose_options(groups, [Limit(1e9 + 1, "parameters")])) == [0, 1]
    assert choose_options(groups, [Limit(1e9 + 2, "parameters")]) == (1, 1)


def test_without_limits_every_group_loses_least() -> None:
    assert choose_options([[Option(2.0, ()), Option(1.0, ())], [Option(0.0, ())]], []) == (1, 0)


@pytest.mark.parametrize("limits", [[], [Limit(1000.0, "parameters", taken=1000.0)]])
def test_of_no_groups_nothing_is_chosen(limits: list[Limit]) -> None:
    assert choose_options([], limits) == ()


def test_what_is_taken_is_too_much_without_groups_as_well() -> None:
    with pytest.raises(RankError, match="at least 1,000 parameters are needed, got 999"):
        choose_options([], [Limit(999.0, "parameters", taken=1000.0)])


def test_a_limit_below_the_least_names_what_is_needed_with_what_is_taken() -> None:
    groups = [[Option(1.0, (10.0,)), Option(0.0, (20.0,))]] * 2
    message = "at least 1,020 parameters are needed, got 1,019"
    with pytest.raises(RankError, match=message):
        choose_options(groups, [Limit(1019.0, "parameters", taken=1000.0)])
    assert choose_options(groups, [Limit(1020.0, "parameters", taken=1000.0)]) == (0, 0)


def test_limits_that_exclude_one_another_name_what_each_would_need() -> None:
    groups = [[Option(0.0, (1.0, 4.5)), Option(0.0, (4.0, 1.5))]]
    message = (
        "3 parameters and 2.5000 ms cannot be met together: with the others as they are, "
        "allow 4 parameters or 4.5000 ms"
    )
    with pytest.raises(RankError, match=message):
        choose_options(groups, [Limit(3.0, "parameters"), Limit(2.5, "ms")])


def test_fortyeight_layers_of_forty_ranks_take_under_two_seconds() -> None:
    generator = np.random.default_rng(0)
    groups = []
    for _ in range(48):
        energy = np.sort(generator.gamma(0.3, size=320))[::-1] / 320
        size = generator.choice([768, 1536, 1920])
        groups.append(
            [
                Option(
                    float(energy[rank:].sum()),
                    (float(rank * size), rank * size * 1e-6 * generator.uniform(0.95, 1.05)),
                )
                for rank in range(8, 328, 8)
            ]
        )
    largest = np.array([options[-1].costs for options in groups]).sum(0)
    began = time.process_time()
    chosen = choose_options(groups, [Limit(0.4 * largest[0], "parameters"), Limit(0.4 * largest[1], "ms")])
    assert len(set(chosen)) > 5
    assert time.process_time() - began < 2
