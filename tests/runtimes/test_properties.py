"""What holds for every input, of that which runs on the board: errors, rates, means, pictures, intervals."""

import math

import numpy as np
import pytest
from helpers import SPEC
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.nn import Parameter
from torch.optim import SGD

from wasi_export.config import Thresholds
from wasi_export.errors import ParityError
from wasi_export.report import Check
from wasi_export.runtimes.accuracy import AccuracyResult, Pairs
from wasi_export.runtimes.augment import augmented
from wasi_export.runtimes.averaging import average_weights
from wasi_export.runtimes.checks import accuracy_check, at_most, drop_check, without_data
from wasi_export.runtimes.energy import EnergyMeter
from wasi_export.runtimes.parity import ParityResult, require_parity, worst
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.schedule import learning_rate
from wasi_export.runtimes.significance import drop_interval, mcnemar_p_value, median_interval, share_interval

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
CONFIDENCES = st.floats(0.8, 0.99)
INTERPOLATIONS = st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"])


@given(st.lists(ANY_FLOAT, min_size=1, max_size=6), st.floats(0, 1))
def test_parity_holds_exactly_where_every_error_is_a_number_within_the_tolerance(errors, tolerance):
    results = [ParityResult(batch, False, error) for batch, error in enumerate(errors, 1)]
    if all(error <= tolerance for error in errors):
        require_parity(results, tolerance)
        assert worst(results).max_error == max(errors)
    else:
        with pytest.raises(ParityError):
            require_parity(results, tolerance)


@given(ANY_FLOAT, st.none() | st.floats(-1e9, 1e9))
def test_a_value_that_is_no_number_never_passes(value, threshold):
    check = at_most("x", value, threshold, "")
    assert (check.status == "passed") is (threshold is not None and value <= threshold)
    assert (check.status == "info") is (threshold is None)
    assert check.value is None or math.isfinite(check.value)


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 10))
def test_a_looser_threshold_never_fails_what_passed(value, threshold, more):
    if at_most("x", value, threshold, "").status == "passed":
        assert at_most("x", value, threshold + more, "").status == "passed"


@given(st.none() | st.floats(0, 1))
def test_a_threshold_without_data_never_passes(threshold):
    found = (
        without_data("x", threshold, "give --data"),
        accuracy_check(None, Thresholds(min_accuracy=threshold)),
    )
    expected = None if threshold is None else "no data"
    assert [check and check.status for check in found] == [expected] * 2


@st.composite
def results(draw):
    labels = draw(arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 3)))
    answers = [draw(arrays(np.int64, len(labels), elements=st.integers(-1, 3))) for _ in range(2)]
    return [AccuracyResult(found, labels) for found in answers]


def status_of(check: Check | None) -> str:
    assert check is not None
    return check.status


ORDER = {"failed": 0, "undecided": 1, "passed": 2}


@given(results(), st.floats(0, 1), st.floats(0, 1), st.none() | CONFIDENCES)
def test_less_accuracy_asked_for_never_makes_a_check_worse(pair, one, other, confidence):
    low, high = sorted((one, other))
    strict, loose = (
        status_of(accuracy_check(pair[0], Thresholds(min_accuracy=least, accuracy_confidence=confidence)))
        for least in (high, low)
    )
    assert ORDER[strict] <= ORDER[loose]


@given(results(), st.floats(-1, 1), CONFIDENCES, CONFIDENCES)
def test_more_confidence_asked_for_never_makes_a_check_better(pair, threshold, one, other):
    pairs, statuses = Pairs.of(*pair), []
    for confidence in (None, *sorted((one, other))):
        limits = Thresholds(max_accuracy_drop=threshold, accuracy_confidence=confidence)
        statuses.append(ORDER[drop_check("drop", pairs, threshold, limits, "").status])
    assert statuses == sorted(statuses, reverse=True)


@given(results())
def test_a_drop_is_the_difference_of_two_accuracies_and_the_reverse_its_negative(pair):
    before, now = pair
    assert Pairs.of(before, now).drop == pytest.approx(before.top1 - now.top1)
    assert Pairs.of(now, before).drop == -Pairs.of(before, now).drop
    assert Pairs.of(now, before).p_value == Pairs.of(before, now).p_value
    assert Pairs.of(before, now).total == before.total


@given(st.integers(0, 60), st.integers(0, 60))
def test_a_p_value_is_a_probability_and_falls_with_the_difference(lost, won):
    p = mcnemar_p_value(lost, won)
    assert 0 < p <= 1
    assert p == mcnemar_p_value(won, lost)
    if lost >= won:
        assert mcnemar_p_value(lost + 1, won) <= p or lost == won


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), CONFIDENCES, CONFIDENCES)
def test_an_interval_holds_its_share_and_is_wider_for_more_confidence(lost, won, rest, one, other):
    total = lost + won + rest
    assume(total)
    intervals = [share_interval(lost, total, confidence) for confidence in sorted((one, other))]
    for low, high in intervals:
        assert 0 <= low <= lost / total + 1e-12
        assert lost / total - 1e-12 <= high <= 1
    (low, high), (lower, higher) = intervals
    assert lower <= low + 1e-12
    assert high <= higher + 1e-12
    drops = [drop_interval(lost, won, total, confidence) for confidence in sorted((one, other))]
    assert -1 <= drops[1][0] <= drops[0][0] <= drops[0][1] <= drops[1][1] <= 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), CONFIDENCES, st.randoms(use_true_random=False))
def test_the_interval_of_a_median_holds_it_in_any_order(samples, confidence, random):
    interval = median_interval(samples, confidence)
    shuffled = random.sample(samples, len(samples))
    assert median_interval(shuffled, confidence) == interval
    if interval is not None:
        assert interval[0] <= float(np.median(samples)) <= interval[1]
        assert interval[0] in samples


@given(st.integers(1, 60), st.integers(0, 30), st.floats(1e-6, 1))
def test_the_rate_of_every_step_is_that_of_timm(steps, warmup, lr):
    warmup = min(warmup, steps // 2)
    optimizer = SGD([Parameter()], lr=lr)
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=warmup, warmup_lr_init=lr / (warmup + 1), t_in_epochs=False
    )
    for step in range(steps):
        schedule.step_update(step)
        rate = learning_rate("cosine", step, lr=lr, steps=steps, warmup=warmup)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)


@given(st.sampled_from(["cosine", "constant"]), st.integers(0, 80), st.integers(0, 60), st.integers(0, 60))
def test_a_rate_is_never_negative_nor_above_the_highest(name, step, steps, warmup):
    rate = learning_rate(name, step, lr=0.5, steps=steps, warmup=warmup)
    assert 0 <= rate <= 0.5
    assert rate > 0 or step >= steps


@st.composite
def states(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    numbers = arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
    count = draw(st.integers(1, 4))
    shares = draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
    return [{"weight": draw(numbers)} for _ in range(count)], shares


@given(states())
def test_a_mean_lies_between_the_states(case):
    made, shares = case
    mean = average_weights(made, shares)["weight"]
    every = np.stack([state["weight"] for state in made])
    slack = 1e-4
    assert (every.min(0) - slack <= mean).all()
    assert (mean <= every.max(0) + slack).all()


@given(states(), st.randoms(use_true_random=False), st.floats(0.1, 10))
def test_a_mean_does_not_depend_on_order_nor_on_the_unit_of_shares(case, random, factor):
    made, shares = case
    order = random.sample(range(len(made)), len(made))
    mean = average_weights(made, shares)["weight"]
    other = average_weights([made[i] for i in order], [factor * shares[i] for i in order])["weight"]
    np.testing.assert_allclose(other, mean, rtol=1e-5, atol=1e-4)


@given(states())
def test_the_mean_of_one_state_many_times_is_that_state(case):
    (first, *_), shares = case
    mean = average_weights([first] * len(shares), shares)["weight"]
    np.testing.assert_allclose(mean, first["weight"], rtol=1e-6)


@st.composite
def pictures(draw):
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    mode = draw(st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK"]))
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@given(
    pictures(),
    st.integers(1, 24),
    st.integers(1, 24),
    st.floats(0.5, 1),
    INTERPOLATIONS,
    st.sampled_from([1, 3]),
)
def test_an_input_has_its_shape_and_range_whatever_the_image(
    image, height, width, crop, interpolation, channels
):
    spec = SPEC.model_copy(
        update={
            "height": height, "width": width, "crop_pct": crop, "interpolation": interpolation,
            "channels": channels, "mean": (0.5,) * channels, "std": (0.5,) * channels,
        }
    )  # fmt: skip
    inputs = Preprocess(spec)(image)
    assert inputs.shape == (channels, height, width)
    assert inputs.dtype == np.float32
    assert inputs.min() >= -1
    assert inputs.max() <= 1


@given(st.integers(0, 255), st.integers(1, 30), st.integers(1, 30), INTERPOLATIONS)
def test_an_image_of_one_colour_stays_of_that_colour(grey, width, height, interpolation):
    spec = SPEC.model_copy(update={"interpolation": interpolation})
    inputs = Preprocess(spec)(Image.new("RGB", (width, height), (grey,) * 3))
    np.testing.assert_allclose(inputs, (grey / 255 - 0.5) / 0.5, atol=1e-6)


@given(pictures(), st.integers(0, 2**31), st.floats(0.01, 1), st.floats(0, 1))
def test_an_augmented_image_has_the_size_of_the_input_and_follows_from_the_seed(image, seed, least, hflip):
    image = image.convert("RGB")
    one, two = (augmented(image, SPEC, seed, scale=(least, 1.0), hflip=hflip) for _ in range(2))
    assert one.size == (SPEC.width, SPEC.height)
    assert one.tobytes() == two.tobytes()


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_energy_is_what_was_counted_however_often_the_counter_went_round(tmp_path_factory, steps):
    """Steps are below the range, as they are where the meter is asked often enough."""
    domain = tmp_path_factory.mktemp("rapl")
    (domain / "max_energy_range_uj").write_text("1000")
    (domain / "energy_uj").write_text("0")
    meter, total = EnergyMeter([domain]), 0
    for step in steps:
        total += step
        (domain / "energy_uj").write_text(str(total % 1000))
        assert meter.joules() == pytest.approx(total / 1e6)
