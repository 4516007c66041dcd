"""Statistics of the gates: properties, agreement with scipy, and intervals that hold as often as they say."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wasi_export.runtimes.significance import (
    drop_interval,
    mcnemar_p_value,
    median_interval,
    share_interval,
)

COUNTS = st.integers(0, 3000)
CONFIDENCES = st.floats(0.8, 0.999)
NUMBERS = st.floats(-1e6, 1e6)


@given(COUNTS, COUNTS)
def test_mcnemar_is_the_two_sided_binomial_test(lost, won):
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    # scipy sums floats of up to 6000 terms.
    assert mcnemar_p_value(lost, won) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_few_changes_is_exact():
    for changed in range(60):
        for lost in range(changed + 1):
            tail = sum(math.comb(changed, k) for k in range(min(lost, changed - lost) + 1))
            assert mcnemar_p_value(lost, changed - lost) == min(1, 2 * tail / 2**changed)


@given(COUNTS, COUNTS)
def test_mcnemar_is_symmetric_and_a_probability(lost, won):
    assert 0 <= mcnemar_p_value(lost, won) == mcnemar_p_value(won, lost) <= 1


@given(st.integers(0, 300), st.integers(1, 300))
def test_a_more_lopsided_change_has_a_smaller_p_value(won, more):
    assert mcnemar_p_value(won + more, won) >= mcnemar_p_value(won + more + 1, won)


def test_mcnemar_of_many_images_is_no_overflow():
    assert mcnemar_p_value(20_000, 20_000) == 1
    assert mcnemar_p_value(5_000, 0) == 0  # 2 / 2^5000 is below floats


@st.composite
def pairs(draw):
    total = draw(st.integers(1, 5000))
    lost = draw(st.integers(0, total))
    return lost, draw(st.integers(0, total - lost)), total


@given(pairs(), CONFIDENCES)
def test_the_interval_of_a_drop_holds_the_drop_within_its_range(counts, confidence):
    lost, won, total = counts
    low, high = drop_interval(lost, won, total, confidence)
    assert -1 <= low <= (lost - won) / total <= high <= 1


def test_the_interval_of_a_drop_is_that_of_the_formula():
    """Of the data in table V of Fagerland, Lydersen and Laake, 1 and 7 of 21: p = 2 / 23 and q = 8 / 23."""
    p, q = 2 / 23, 8 / 23
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 23)
    found = drop_interval(1, 7, 21, 0.95)
    assert found == pytest.approx((p - q - half, p - q + half), rel=1e-6)
    assert found == pytest.approx((-0.508, -0.013), abs=5e-4)


@given(st.integers(1, 5000), CONFIDENCES)
def test_without_a_change_the_interval_of_a_drop_is_of_one_image_more_of_each_kind(total, confidence):
    half = stats.norm.ppf((1 + confidence) / 2) * math.sqrt(2) / (total + 2)
    expected = (-min(1, half), min(1, half))
    assert drop_interval(0, 0, total, confidence) == pytest.approx(expected, rel=1e-9)


@given(pairs(), CONFIDENCES)
def test_the_interval_of_a_drop_turns_with_the_models(counts, confidence):
    lost, won, total = counts
    low, high = drop_interval(lost, won, total, confidence)
    assert drop_interval(won, lost, total, confidence) == pytest.approx((-high, -low))


@given(pairs(), CONFIDENCES)
def test_the_interval_of_a_drop_moves_with_it_and_widens_with_confidence(counts, confidence):
    lost, won, total = counts
    low, high = drop_interval(lost, won, total, confidence)
    wider = drop_interval(lost, won, total, (1 + confidence) / 2)
    assert wider[0] <= low
    assert high <= wider[1]
    if lost + won < total:
        assert low + high <= sum(drop_interval(lost + 1, won, total, confidence)) + 1e-12


@given(pairs(), CONFIDENCES)
def test_the_interval_of_a_drop_narrows_with_images_of_the_same_kind(counts, confidence):
    lost, won, total = counts
    narrow = drop_interval(100 * lost, 100 * won, 100 * total, confidence)
    wide = drop_interval(lost, won, total, confidence)
    assert np.ptp(narrow) < np.ptp(wide) or wide[0] == -1 or wide[1] == 1


@given(pairs(), CONFIDENCES)
def test_the_interval_of_a_share_is_that_of_scipy(counts, confidence):
    count, _, total = counts
    expected = stats.binomtest(count, total).proportion_ci(confidence, method="wilson")
    found = share_interval(count, total, confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= found[0] <= count / total + 1e-12
    assert count / total - 1e-12 <= found[1] <= 1


def test_the_interval_of_none_begins_at_0_and_that_of_all_ends_at_1():
    for total in range(1, 300):  # of 230 it would be 1 + 2e-16
        assert share_interval(0, total, 0.8)[0] == 0
        assert share_interval(total, total, 0.8)[1] == pytest.approx(1, rel=1e-15)
        assert share_interval(total, total, 0.8)[1] <= 1


@given(st.lists(NUMBERS, min_size=1, max_size=200), CONFIDENCES)
def test_the_interval_of_a_median_is_two_of_the_samples_around_it(samples, confidence):
    found = median_interval(samples, confidence)
    few = len(samples) < math.log2(2 / (1 - confidence))
    assert (found is None) == few
    if found is not None:
        assert found[0] in samples
        assert found[1] in samples
        assert found[0] <= np.median(samples) <= found[1]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 1 - 0.05 / 3, 0.999])
def test_the_interval_of_a_median_is_the_narrowest_that_keeps_the_confidence(confidence):
    for n in (*range(1, 300), 2000):
        found = median_interval(range(n), confidence)
        k = 0 if found is None else found[0] + 1
        assert found is None or found == (k - 1, n - k)
        assert k == 0 or 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= confidence - 1e-12
        assert 1 - 2 * stats.binom.cdf(k, n, 0.5) < confidence + 1e-12


def test_an_interval_of_a_median_may_keep_the_confidence_by_nothing():
    assert median_interval([3, 1, 2], 0.75) == (1, 3)  # of two tails of 1 / 8
    assert median_interval([3, 1, 2], 0.76) is None


@given(st.lists(NUMBERS, min_size=8, max_size=60), st.floats(0.5, 2))
def test_the_interval_of_a_median_scales_with_the_samples_and_forgets_their_order(samples, scale):
    found = median_interval(samples, 0.95)
    assert median_interval(sorted(samples), 0.95) == found
    assert median_interval([scale * sample for sample in samples], 0.95) == tuple(scale * x for x in found)


def test_the_interval_of_a_median_covers_it_whatever_the_distribution(rng):
    draws = {
        "log-normal": (rng.lognormal(0, 1, (4000, 30)), 1.0),
        "with outliers": (rng.standard_cauchy((4000, 30)), 0.0),
        "of two humps": (rng.choice([-1, 1], (4000, 30)) + rng.normal(0, 1, (4000, 30)), 0.0),
    }
    for name, (samples, median) in draws.items():
        found = np.array([median_interval(row.tolist(), 0.95) for row in samples])
        coverage = ((found[:, 0] <= median) & (median <= found[:, 1])).mean()
        # 95.7 % for 30 samples; the standard deviation of 4000 draws is 0.33 %.
        assert 0.945 < coverage < 0.97, name


# How often an interval of 95 % holds the true drop, of exact sums over all counts. Fagerland, Lydersen and
# Laake find the same: near its level, on the safe side where changes are few.
@pytest.mark.parametrize("total", [25, 100, 359])
@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.01, 0.01), (0.05, 0.02), (0.1, 0.1), (0.3, 0.05)])
def test_the_interval_of_a_drop_covers_it(total, lost, won):
    coverage = 0.0
    counts = range(total + 1)
    chance_lost = stats.binom.pmf(counts, total, lost)
    for first, first_chance in enumerate(chance_lost):
        if first_chance < 1e-6:
            continue
        rest = range(total - first + 1)
        chances = stats.binom.pmf(rest, total - first, won / (1 - lost))
        for second, chance in zip(rest, chances, strict=True):
            low, high = drop_interval(first, second, total, 0.95)
            coverage += first_chance * chance * (low <= lost - won <= high)
    assert coverage > 0.94


def test_intervals_of_different_confidence_lie_within_one_another():
    nested = [drop_interval(9, 4, 200, confidence) for confidence in (0.8, 0.9, 0.95, 0.99, 0.999)]
    for inner, outer in pairwise(nested):
        assert outer[0] < inner[0] < inner[1] < outer[1]


def test_a_small_p_value_and_an_interval_without_zero_go_together():
    for lost in range(60):
        for won in range(60):
            low, high = drop_interval(lost, won, 200, 0.95)
            p_value = mcnemar_p_value(lost, won)
            differ = low > 0 or high < 0
            assert differ or p_value > 0.01
            assert not differ or p_value < 0.08
