"""When a check passes, fails or is undecided; and that no threshold passes without data, now or later."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wasi_export.artifact import Bundle
from wasi_export.config import Thresholds
from wasi_export.errors import ConfigError, ExitCode
from wasi_export.image_files import NAMES_TOLD
from wasi_export.image_set import ImageSet
from wasi_export.report import Latency
from wasi_export.runtimes.accuracy import AccuracyResult, Pairs
from wasi_export.runtimes.checks import (
    _decide,
    accuracy_check,
    at_most,
    drop_check,
    latency_check,
    left_out_check,
    size_check,
)
from wasi_export.runtimes.elsewhere.validate import _checks
from wasi_export.runtimes.validate import validate

STRICT = {
    "max_parity_error": 1e-30,
    "min_accuracy": 1.0,
    "max_accuracy_drop": -1.0,
    "accuracy_confidence": 0.95,
    "max_latency_ratio": 1e-9,
    "max_size_mb": 1e-9,
    "max_memory_mb": 1e-9,
}
"""A value for each threshold that nothing can meet."""
MODIFIERS = {"accuracy_confidence"}
"""Thresholds that say how another one is judged, and are refused alone."""


def latency(ratio: float, interval: tuple[float, float] | None, noise: float | None) -> list[Latency]:
    def one(ratio: float, interval: tuple[float, float] | None) -> Latency:
        return Latency(
            model="m", batch=1, threads=1, p50_ms=ratio, p90_ms=1, p99_ms=1, ratio_to_first=ratio,
            ratio_low=ratio, ratio_high=ratio, ratio_interval=interval, noise_floor=noise, load_ms=1,
            peak_rss_mb=1, clock="cpu", samples_ms=(ratio,) * 30,
        )  # fmt: skip

    return [one(1, (1, 1)), one(ratio, interval)]


@pytest.mark.parametrize(
    ("interval", "noise", "threshold", "status"),
    [
        ((0.48, 0.52), 0.0, 0.52, "passed"),
        ((0.48, 0.52), 0.0, 0.51, "undecided"),
        ((0.48, 0.52), 0.0, 0.48, "undecided"),
        ((0.48, 0.52), 0.0, 0.47, "failed"),
        ((0.48, 0.52), 0.10, 0.54, "undecided"),  # 0.50 times 1.1 is 0.55
        ((0.48, 0.52), 0.10, 0.56, "passed"),
        ((0.48, 0.52), 0.10, 0.46, "undecided"),
        ((0.48, 0.52), 0.10, 0.45, "failed"),
        (None, None, 1e6, "undecided"),  # too few rounds
        ((0.48, 0.52), 0.0, None, "info"),
    ],
)
def test_a_latency_passes_and_fails_with_its_whole_interval(interval, noise, threshold, status):
    check = latency_check(latency(0.5, interval, noise), threshold)
    assert check.status == status
    assert (check.interval is None) == (interval is None)


WIDTHS = st.floats(0, 0.5)


@given(st.floats(0.1, 2), WIDTHS, WIDTHS, WIDTHS, st.floats(0.05, 3), st.floats(0, 2))
def test_a_wider_latency_threshold_is_never_worse(ratio, below, above, noise, threshold, more):
    order = ("failed", "undecided", "passed")
    found = latency(ratio, (ratio * (1 - below), ratio * (1 + above)), noise)
    first, second = (latency_check(found, limit) for limit in (threshold, threshold + more))
    assert order.index(first.status) <= order.index(second.status)
    assert first.interval[0] <= ratio <= first.interval[1]


def accuracy(right: int, total: int) -> AccuracyResult:
    return AccuracyResult(np.arange(total) >= right, np.zeros(total, np.int64))


@pytest.mark.parametrize(
    ("right", "limits", "status"),
    [
        (95, {"min_accuracy": 0.95}, "passed"),
        (95, {"min_accuracy": 0.96}, "failed"),
        (95, {"min_accuracy": 0.95, "accuracy_confidence": 0.95}, "undecided"),
        (95, {"min_accuracy": 0.88, "accuracy_confidence": 0.95}, "passed"),  # Wilson: from 0.888
        (95, {"min_accuracy": 0.89, "accuracy_confidence": 0.95}, "undecided"),
        (95, {"min_accuracy": 0.96, "accuracy_confidence": 0.95}, "failed"),
        (95, {}, "info"),
    ],
)
def test_an_accuracy_is_judged_as_measured_or_with_confidence(right, limits, status):
    assert accuracy_check(accuracy(right, 100), Thresholds(**limits)).status == status


@pytest.mark.parametrize(
    ("pairs", "confidence", "status"),
    [
        (Pairs(90, 3, 1, 6), None, "passed"),
        (Pairs(90, 4, 1, 5), None, "failed"),
        (Pairs(90, 3, 1, 6), 0.95, "undecided"),
        (Pairs(90, 4, 1, 5), 0.95, "failed"),
        (Pairs(9990, 0, 0, 10), 0.95, "passed"),
        (Pairs(90, 0, 0, 10), 0.95, "undecided"),  # no change in 100 images is not yet less than 2 % of all
    ],
)
def test_a_drop_is_judged_as_measured_or_with_confidence(pairs, confidence, status):
    limits = Thresholds(max_accuracy_drop=0.02, accuracy_confidence=confidence)
    check = drop_check("accuracy drop", pairs, 0.02, limits, "")
    assert check.status == status
    assert check.value == pairs.drop
    assert check.interval[0] <= check.value <= check.interval[1]
    assert check.p_value == pairs.p_value
    assert check.confidence == (confidence or 0.95)
    assert ("too few images" in check.detail) == (status == "undecided")


@given(st.integers(0, 50), st.integers(0, 50), st.floats(-1, 1), st.floats(0.8, 0.999))
def test_confidence_only_turns_passes_into_undecided(lost, won, threshold, confidence):
    pairs = Pairs(100, lost, won, 0)
    plain, sure = (
        drop_check(
            "drop", pairs, threshold, Thresholds(max_accuracy_drop=threshold, accuracy_confidence=c), ""
        )
        for c in (None, confidence)
    )
    assert (plain.status, sure.status) in {
        ("failed", "failed"), ("passed", "passed"), ("passed", "undecided"),
    }  # fmt: skip


def test_the_number_of_images_that_would_do_does():
    limits = Thresholds(max_accuracy_drop=0.02, accuracy_confidence=0.95)
    few = drop_check("drop", Pairs(90, 1, 0, 9), 0.02, limits, "")
    assert "about 1,0" in few.detail
    assert drop_check("drop", Pairs(990, 11, 0, 99), 0.02, limits, "").status == "passed"


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=False))
def test_what_is_not_a_number_never_passes(value, threshold):
    check = at_most("error", value, threshold, "")
    assert check.status == ("passed" if value <= threshold else "failed")
    if math.isnan(value):
        assert (check.status, check.value) == ("failed", None)


@pytest.mark.parametrize("name", Thresholds.model_fields)
def test_a_threshold_alone_never_passes_on_a_bundle_alone(name, finished_bundle):
    """Where there is data in the bundle it fails, else it has none: a new key cannot be forgotten."""
    if name in MODIFIERS:
        with pytest.raises(ConfigError, match=f"{name} is how sure"):
            Thresholds.from_toml(None, {name: STRICT[name]})
        return
    report = validate(Bundle.open(finished_bundle), Thresholds(**{name: STRICT[name]}))
    assert report.exit_code in {ExitCode.CHECK_FAILED, ExitCode.NOTHING_TO_CHECK}
    assert [check.threshold for check in report.checks if check.status in {"failed", "no data"}] == [
        STRICT[name]
    ]


@pytest.mark.parametrize("name", sorted(set(Thresholds.model_fields) - MODIFIERS - {"min_accuracy"}))
def test_a_threshold_alone_never_passes_on_an_emulated_board(name, finished_bundle):
    bundle = Bundle.open(finished_bundle)
    results = {"model.onnx": bundle.golden().outputs + np.float32(1e-3)}
    checks = tuple(_checks(bundle, Thresholds(**{name: STRICT[name]}), results))
    assert {"failed", "no data"} & {check.status for check in checks if check.threshold == STRICT[name]}


def answers(right: int, total: int) -> AccuracyResult:
    return AccuracyResult(np.arange(total) < right, np.ones(total, np.int64))


def test_an_accuracy_tells_its_images_and_its_interval():
    check = accuracy_check(answers(7, 10), Thresholds())
    assert check is not None
    assert check.detail == "top-1, 7 of 10 images right; 95 % interval 0.3968 to 0.8922"
    assert (check.name, check.status, check.confidence) == ("accuracy", "info", 0.95)


def test_the_accuracy_of_a_further_graph_is_for_information():
    check = accuracy_check(answers(7, 10), Thresholds(min_accuracy=0.9), "dense, int8")
    assert check is not None
    assert (check.name, check.status, check.threshold) == ("accuracy of dense, int8", "info", None)


@pytest.mark.parametrize(("uncertainty", "is_near"), [(0.1 + 1e-9, True), (0.1, False)])
def test_at_its_threshold_no_number_of_images_would_do(uncertainty, is_near):
    _, remark = _decide(0.001, uncertainty, 50, Thresholds(min_accuracy=0.5, accuracy_confidence=0.95))
    assert ("the value is at its threshold" in remark) is is_near
    assert ("images" in remark.partition(";")[2] or "would do" in remark) is not is_near


def test_an_accuracy_that_is_just_sure_enough_passes():
    limits = Thresholds(min_accuracy=0.5, accuracy_confidence=0.95)
    assert _decide(0.125, 0.125, 50, limits) == ("passed", "")


def test_a_latency_tells_its_interval_its_rounds_and_the_noise():
    known, unknown = (latency_check(latency(0.5, of, 0.02), 0.4) for of in ((0.48, 0.52), None))
    assert known is not None
    assert unknown is not None
    assert (known.interval, known.confidence) == ((0.48, 0.52), 0.95)
    for part in ("95 % interval 0.48 to 0.52", "30 rounds", "noise floor 2.0%"):
        assert part in known.detail
    assert (unknown.interval, unknown.confidence) == (None, None)
    assert "give more --rounds" in unknown.detail
    assert latency_check(latency(0.5, (0.48, 0.52), 0.0) * 2, None) is not None  # of the first two


def test_a_size_is_of_the_fp32_graph_in_millions_of_bytes(finished_bundle):
    bundle = Bundle.open(finished_bundle)
    check = size_check(bundle, 1.0)
    assert check.value == (finished_bundle / "model.onnx").stat().st_size / 1e6
    assert (check.unit, check.status) == ("MB", "passed")


@pytest.mark.parametrize("count", [0, 1, NAMES_TOLD, NAMES_TOLD + 1, NAMES_TOLD + 2])
def test_images_that_were_left_out_are_counted_and_the_first_ones_named(count):
    names = tuple(f"{index}.png" for index in range(count))
    images = ImageSet(("a",), np.zeros(1, np.int64), lambda _: None, "f", unreadable=names)  # type: ignore[arg-type,return-value]
    check = left_out_check(images)
    if count == 0:
        assert check is None
        return
    assert check is not None
    told, more = ", ".join(names[:NAMES_TOLD]), count - NAMES_TOLD
    assert check.detail == f"cannot be read: {told}" + (f", and {more} more" if more > 0 else "")
    assert (check.status, check.value) == ("info", count)


def test_without_images_none_is_left_out():
    assert left_out_check(None) is None
