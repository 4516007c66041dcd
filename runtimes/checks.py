"""What is measured, held against its threshold: one function for each check.

A value that is known exactly is at most its threshold or is not. A ratio of latencies passes with its whole
confidence interval and fails with its whole interval; what lies between is `undecided`, never a pass. An
accuracy is that of these images, so it decides as it is, but where `accuracy_confidence` asks how sure that
is of others. What `undecided` and `no data` mean for a CI: docs/gates.md.
"""

import math
from collections.abc import Sequence

from wasi_export.artifact import Bundle
from wasi_export.config import Thresholds
from wasi_export.image_files import NAMES_TOLD
from wasi_export.image_set import ImageSet
from wasi_export.manifest import MODEL
from wasi_export.report import Check, Latency, Status
from wasi_export.runtimes.accuracy import AccuracyResult, Pairs
from wasi_export.runtimes.bench import CONFIDENCE
from wasi_export.runtimes.significance import Interval, share_interval


def at_most(name: str, value: float, threshold: float | None, detail: str, unit: str = "") -> Check:
    """Returns the check of a value that should not be above its threshold."""
    return Check(
        name=name,
        status="info" if threshold is None else "passed" if value <= threshold else "failed",
        value=value if math.isfinite(value) else None,
        threshold=threshold,
        unit=unit,
        detail=detail,
    )


def without_data(name: str, threshold: float | None, remedy: str) -> Check | None:
    """Returns what becomes of a check for which nothing was measured: none where nothing was asked."""
    if threshold is None:
        return None
    return Check(name=name, status="no data", threshold=threshold, detail=remedy)


def left_out_check(images: ImageSet | None) -> Check | None:
    """Returns how many files of images could not be read and were left out; None where all could."""
    if images is None or not images.unreadable:
        return None
    names, more = images.unreadable[:NAMES_TOLD], len(images.unreadable) - NAMES_TOLD
    detail = f"cannot be read: {', '.join(names)}" + (f", and {more} more" if more > 0 else "")
    return Check(name="images left out", status="info", value=len(images.unreadable), detail=detail)


def accuracy_name(graph: str = "") -> str:
    """Returns the name of the check of a graph's accuracy; of the bundle's own without a name."""
    return f"accuracy of {graph}" if graph else "accuracy"


def accuracy_check(accuracy: AccuracyResult | None, limits: Thresholds, graph: str = "") -> Check | None:
    """Returns the check of an accuracy; that of a further graph, by name, is for information."""
    threshold = None if graph else limits.min_accuracy
    if accuracy is None:
        return without_data("accuracy", threshold, "give --data")
    confidence = limits.accuracy_confidence or CONFIDENCE
    interval = share_interval(accuracy.correct, accuracy.total, confidence)
    margin = None if threshold is None else accuracy.top1 - threshold
    status, remark = _decide(margin, accuracy.top1 - interval[0], accuracy.total, limits)
    return Check(
        name=accuracy_name(graph),
        status=status,
        value=accuracy.top1,
        threshold=threshold,
        interval=interval,
        confidence=confidence,
        detail=f"top-1, {accuracy.correct} of {accuracy.total} images right; "
        f"{_of_interval(interval, confidence)}{remark}",
    )


def drop_check(name: str, pairs: Pairs, threshold: float | None, limits: Thresholds, detail: str) -> Check:
    """Returns the check of how much less accurate one model is than another on the same images."""
    confidence = limits.accuracy_confidence or CONFIDENCE
    interval = pairs.interval(confidence)
    margin = None if threshold is None else threshold - pairs.drop
    status, remark = _decide(margin, interval[1] - pairs.drop, pairs.total, limits)
    return Check(
        name=name,
        status=status,
        value=pairs.drop,
        threshold=threshold,
        interval=interval,
        confidence=confidence,
        p_value=pairs.p_value,
        detail=f"{detail}; {pairs.lost} images lost, {pairs.won} won of {pairs.total}; "
        f"{_of_interval(interval, confidence)}, p = {pairs.p_value:.2g}{remark}",
    )


def latency_check(latency: Sequence[Latency], threshold: float | None) -> Check | None:
    """Returns the check of the ratio of the second latency to the first."""
    if not latency:
        return without_data("latency ratio", threshold, "give --baseline")
    baseline, own = latency[:2]
    bounds = _ratio_bounds(own)
    status, remark = _decide_ratio(bounds, threshold)
    spread = (
        f"{_of_interval(bounds, CONFIDENCE)}, noise floor {own.noise_floor:.1%}" if bounds else "no interval"
    )
    return Check(
        name="latency ratio",
        status=status,
        value=own.ratio_to_first,
        threshold=threshold,
        interval=bounds,
        confidence=CONFIDENCE if bounds else None,
        detail=f"p50 {own.p50_ms:.2f} ms, baseline {baseline.p50_ms:.2f} ms; "
        f"{spread}, {len(own.samples_ms)} rounds{remark}",
    )


def size_check(bundle: Bundle, threshold: float | None) -> Check:
    """Returns the check of the size of the fp32 graph."""
    return at_most("size", bundle.manifest.files[MODEL].size_bytes / 1e6, threshold, MODEL, unit="MB")


def memory_check(peak_rss_mb: float, threshold: float | None) -> Check:
    """Returns the check of the memory that the fp32 graph takes."""
    detail = f"peak of a fresh process that loads {MODEL} and runs one image"
    return at_most("memory", peak_rss_mb, threshold, detail, unit="MB")


def _decide(margin: float | None, uncertainty: float, images: int, limits: Thresholds) -> tuple[Status, str]:
    """Returns the status of an accuracy that is within its threshold by a margin, and what to add to that.

    Args:
        margin: None without a threshold; below 0 the threshold is missed.
        uncertainty: how much worse the accuracy of all such images may be, by the confidence interval.
        images: how many there are.
        limits: whether to be sure.
    """
    if margin is None:
        return "info", ""
    if margin < 0:
        return "failed", ""
    if limits.accuracy_confidence is None or uncertainty <= margin:
        return "passed", ""
    # An interval narrows with the square root of the images.
    if uncertainty > 100 * margin:
        remedy = "the value is at its threshold"
    else:
        remedy = f"about {math.ceil(images * (uncertainty / margin) ** 2):,} of the kind would do"
    return "undecided", f": too few images to be sure; {remedy}"


def _decide_ratio(bounds: Interval | None, threshold: float | None) -> tuple[Status, str]:
    """Returns the status of a ratio that is between bounds, and what to add to that; None: too few rounds."""
    if threshold is None:
        return "info", ""
    if bounds is None:
        return "undecided", ": give more --rounds"
    low, high = bounds
    if high <= threshold:
        return "passed", ""
    if low > threshold:
        return "failed", ""
    return (
        "undecided",
        f": {threshold:g} is within it; give more --rounds, a quieter machine or another threshold",
    )


def _ratio_bounds(own: Latency) -> Interval | None:
    """Returns between what the ratio of a latency is: its interval, or the noise floor where that is wider.

    The interval says how well this run knows its median; the noise floor how far off runs as this one are.
    """
    if own.ratio_interval is None or own.noise_floor is None:
        return None
    (low, high), noise = own.ratio_interval, 1 + own.noise_floor
    return min(low, own.ratio_to_first / noise), max(high, own.ratio_to_first * noise)


def _of_interval(interval: Interval, confidence: float) -> str:
    low, high = interval
    return f"{100 * confidence:g} % interval {low:.4g} to {high:.4g}"
