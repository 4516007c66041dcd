"""What holds for every input, of that which is pure arithmetic: ranks, costs, choices, verdicts."""

import itertools
import math

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from wasi_export.allocate import LayerSpectrum, candidates
from wasi_export.config import SubspaceConfig
from wasi_export.cost import FLOAT_BYTES, LinearForm, saved_input_bytes
from wasi_export.errors import ExitCode, RankError
from wasi_export.knapsack import RELATIVE_GAP, Limit, Option, choose_options
from wasi_export.ranks import (
    RANK_STEP,
    ActivationRanks,
    break_even_rank,
    candidate_ranks,
    choose_rank,
    round_rank,
)
from wasi_export.report import Check, Report, Status

from report_inputs import make_report  # isort: skip

SIZES = st.integers(1, 4096)
STATUSES: tuple[Status, ...] = ("passed", "failed", "undecided", "no data", "info")
SPECTRUM = st.lists(st.floats(0, 1e3), min_size=1, max_size=64).map(lambda s: np.sort(np.array(s))[::-1])


@given(SIZES, SIZES)
def test_break_even_is_below_the_smaller_side_and_alike_for_the_transpose(d_out, d_in):
    assert min(d_out, d_in) / 2 <= break_even_rank(d_out, d_in) < min(d_out, d_in)
    assert break_even_rank(d_out, d_in) == break_even_rank(d_in, d_out)


@given(SPECTRUM, st.integers(32, 4096), st.integers(32, 4096), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_larger_fraction_never_gives_a_smaller_rank(spectrum, d_out, d_in, one, other):
    """A layer that stays dense has the largest rank of all."""
    full = min(d_out, d_in)
    low, high = (
        choose_rank(spectrum, d_out, d_in, SubspaceConfig(fraction=fraction))[0] or full
        for fraction in sorted((one, other))
    )
    assert low <= high


@given(SPECTRUM, SIZES, SIZES, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_a_larger_epsilon_never_gives_a_smaller_rank(spectrum, d_out, d_in, one, other):
    full = min(d_out, d_in)
    low, high = (
        choose_rank(spectrum, d_out, d_in, SubspaceConfig(epsilon=epsilon))[0] or full
        for epsilon in sorted((one, other))
    )
    assert low <= high


@given(SPECTRUM, SIZES, SIZES, st.floats(0.01, 1.0))
def test_a_rank_by_epsilon_is_whole_blocks_that_keep_the_energy(spectrum, d_out, d_in, epsilon):
    rank, _ = choose_rank(spectrum, d_out, d_in, SubspaceConfig(epsilon=epsilon))
    if rank is not None:
        assert rank % RANK_STEP == 0
        energy = spectrum**2
        assert energy[:rank].sum() >= (epsilon - 1e-12) * energy.sum()


@given(st.floats(0, 4096), st.floats(0, 4096))
def test_rounding_keeps_the_order_and_is_done_once(one, other):
    low, high = sorted((one, other))
    assert round_rank(low) <= round_rank(high)
    assert round_rank(round_rank(one)) == round_rank(one)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.none() | st.integers(1, 5))
def test_parameters_and_macs_are_those_that_are_counted(d_out, d_in, tokens, rank):
    """Counted by the shapes of the products: x·Rᵀ·Lᵀ, or x·Wᵀ."""
    shapes = [(d_out, d_in)] if rank is None else [(rank, d_in), (d_out, rank)]
    assert LinearForm(d_out, d_in, tokens, rank).parameters == sum(map(math.prod, shapes))
    macs = sum(
        1 for rows, columns in shapes for _ in itertools.product(range(tokens), range(rows), range(columns))
    )
    assert LinearForm(d_out, d_in, tokens, rank).macs == macs


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 32))
def test_a_pair_costs_less_than_the_layer_exactly_below_break_even(d_out, d_in, rank, tokens):
    dense, pair = (LinearForm(d_out, d_in, tokens, r) for r in (None, rank))
    below = rank * (d_out + d_in) < d_out * d_in
    assert (pair.parameters < dense.parameters) is below
    assert (pair.macs < dense.macs) is below


@given(SIZES, st.integers(1, 16), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_a_saved_input_has_the_bytes_of_its_parts(d_in, batch, tokens, feature, token):
    ranks = ActivationRanks(feature=feature, token=token, token_count=tokens)
    parts = (np.empty((batch, token, feature)), np.empty((tokens, token)), np.empty((d_in, feature)))
    expected = FLOAT_BYTES * sum(part.size for part in parts)
    assert saved_input_bytes(d_in, ranks, batch=batch, tokens=tokens) == expected


@given(st.integers(1, 128), st.integers(1, 100))
def test_the_batch_rank_grows_with_the_batch_and_never_beyond_it(rank, count):
    ranks = ActivationRanks(batch=rank, batch_count=count)
    found = [ranks.batch_rank(batch) for batch in range(1, 40)]
    assert all(1 <= of <= batch for batch, of in enumerate(found, 1))
    assert found == sorted(found)


@st.composite
def small_knapsacks(draw):
    option = st.builds(Option, loss=st.floats(0, 10), costs=st.tuples(st.floats(0, 10), st.floats(0, 10)))
    groups = draw(st.lists(st.lists(option, min_size=1, max_size=3), min_size=1, max_size=4))
    return groups, [Limit(draw(st.floats(0, 30)), "units") for _ in range(2)]


@given(small_knapsacks())
def test_a_choice_is_the_best_of_all_that_there_are(problem):
    groups, limits = problem
    fits = [
        sum(option.loss for option in chosen)
        for chosen in itertools.product(*groups)
        if all(sum(o.costs[r] for o in chosen) <= limits[r].amount for r in range(2))
    ]
    nearly = any(
        abs(sum(o.costs[r] for o in chosen) - limits[r].amount) < 1e-6 * max(1, limits[r].amount)
        for chosen in itertools.product(*groups)
        for r in range(2)
    )
    assume(not nearly)  # a sum that is at its limit is within it or not by rounding
    try:
        indices = choose_options(groups, limits)
    except RankError:
        assert fits == []
        return
    loss = sum(options[index].loss for options, index in zip(groups, indices, strict=True))
    assert loss <= min(fits) * (1 + RELATIVE_GAP) + 1e-6


@given(small_knapsacks(), st.floats(1, 2))
def test_a_higher_limit_never_makes_a_choice_worse(problem, factor):
    groups, limits = problem
    wider = [Limit(limit.amount * factor, limit.unit) for limit in limits]
    try:
        before = choose_options(groups, limits)
    except RankError:
        return
    after = choose_options(groups, wider)
    first, second = (
        sum(options[index].loss for options, index in zip(groups, chosen, strict=True))
        for chosen in (before, after)
    )
    assert second <= first * (1 + RELATIVE_GAP) + 1e-6


@given(st.lists(st.sampled_from(STATUSES), max_size=6))
def test_nothing_but_passed_checks_is_a_pass(statuses):
    report = make_report(*(Check(name=f"{i}", status=status) for i, status in enumerate(statuses)))
    passed = "passed" in statuses and set(statuses) <= {"passed", "info"}
    assert (report.exit_code == ExitCode.PASSED) is passed
    assert (report.verdict == "passed") is passed


@given(st.lists(st.sampled_from(STATUSES), max_size=6), st.sampled_from(STATUSES[1:4]))
def test_one_more_check_that_is_not_passed_never_makes_a_pass(statuses, worse):
    checks = [Check(name=f"{i}", status=status) for i, status in enumerate((*statuses, worse))]
    assert make_report(*checks).exit_code in (ExitCode.CHECK_FAILED, ExitCode.NOTHING_TO_CHECK)
    assert make_report(*checks).exit_code == make_report(*reversed(checks)).exit_code


@given(st.lists(st.sampled_from(STATUSES), min_size=1, max_size=6))
def test_a_verdict_names_every_check_that_is_not_passed(statuses):
    checks = [Check(name=f"check-{i}", status=status) for i, status in enumerate(statuses)]
    report: Report = make_report(*checks)
    for check in checks:
        assert (check.name in report.verdict) is (check.status in STATUSES[1:4])


@given(st.integers(33, 512), st.integers(33, 512), st.floats(0.001, 1), st.floats(0.1, 10))
def test_a_candidate_with_more_parameters_loses_less(d_out, d_in, decay, weight):
    squared = np.exp(-decay * np.arange(min(d_out, d_in)))
    found = candidates(LayerSpectrum("fc", d_out, d_in, 5, squared, float(squared.sum()), weight))
    assert [c.parameters for c in found] == sorted(c.parameters for c in found)
    assert [c.error for c in found] == sorted((c.error for c in found), reverse=True)
    assert found[-1].error == 0


@given(st.integers(33, 512), st.integers(33, 512))
def test_candidate_ranks_are_below_break_even_and_in_order(d_out, d_in):
    ranks = candidate_ranks(d_out, d_in)
    assert list(ranks) == sorted(set(ranks))
    assert all(rank * (d_out + d_in) < d_out * d_in for rank in ranks)
