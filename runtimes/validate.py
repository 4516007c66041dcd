"""Is this bundle good enough, on this machine? Every check, its threshold, and one verdict.

integrity → load → parity with the golden data → accuracy → accuracy drop → latency ratio → size. The
integrity of every file was checked when the `Bundle` was opened; nothing of it is read before. A threshold
for which there is nothing to measure is `no data`, which never passes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from wasi_export.artifact import MODEL, Bundle
from wasi_export.config import Thresholds
from wasi_export.datasets import ImageSet
from wasi_export.durable import write_bytes
from wasi_export.errors import DataError, UsageError
from wasi_export.junit import to_junit
from wasi_export.progress import Track, silent
from wasi_export.report import Check, Latency, Report
from wasi_export.runtimes.accuracy import AccuracyResult, measure_accuracy
from wasi_export.runtimes.bench import measure_latency
from wasi_export.runtimes.host import describe_host
from wasi_export.runtimes.parity import measure_parity, relative_error, worst
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session
from wasi_export.views import to_markdown

QUANTIZED_MARGIN = 1.5
"""By how much rounding on another processor may raise the error of a quantised graph."""


def validate(
    bundle: Bundle,
    thresholds: Thresholds,
    *,
    baseline: Bundle | None = None,
    images: ImageSet | None = None,
    beside: Sequence[tuple[str, Path]] = (),
    threads: int = 1,
    rounds: int = 30,
    track: Track = silent,
) -> Report:
    """Returns the report of all checks; a threshold that is missed is in the report, not raised.

    Accuracy needs labelled `images`, the latency ratio needs the `baseline` (the dense twin), the accuracy
    drop both. What is measured without a threshold is reported for information; so are graphs `beside`, by
    name, of the bundle's input and classes.

    Raises:
        DataError: an image cannot be read, or the baseline has other classes.
        NothingToCheckError: the image set is empty.
        HostError: a model needs a newer onnxruntime.
        ModelFailedError: a model does not load, or fails.
        IntegrityError: the golden data cannot be read.
    """
    if baseline and baseline.manifest.classes != bundle.manifest.classes:
        raise DataError(f"{baseline.path} has other classes than {bundle.path}: give its dense twin")
    manifest = bundle.manifest
    integrity = Check(
        name="integrity", status="passed", detail=f"{len(manifest.files)} files as in the manifest"
    )
    load = _load(bundle, threads)
    parity = _parity(bundle, thresholds.max_parity_error, threads)
    accuracy = _accuracy(bundle, images, threads, track)
    baseline_accuracy = _accuracy(baseline, images, threads, track)
    accuracies = {
        name: _accuracy(owner, images, threads, track, path)
        for owner, graphs in (
            (baseline, _quantized(baseline, "baseline")),
            (bundle, (*_quantized(bundle, "bundle"), *beside)),
        )
        for name, path in graphs
    }
    latency: tuple[Latency, ...] = ()
    if baseline:
        others = (*_quantized(baseline, "baseline"), *_quantized(bundle, "bundle"), *beside)
        models = [("baseline", baseline.model_path), ("bundle", bundle.model_path), *others]
        latency = measure_latency(models, threads=threads, rounds=rounds, track=track)
    checks = (
        integrity,
        load,
        parity,
        _accuracy_check(accuracy, thresholds.min_accuracy),
        _drop_check(accuracy, baseline_accuracy, thresholds.max_accuracy_drop),
        _latency_check(latency, thresholds.max_latency_ratio),
        size_check(bundle, thresholds.max_size_mb),
        *_quantized_checks(bundle, accuracy, accuracies),
        *(_accuracy_check(found, None, name) for name, found in accuracies.items()),
    )
    return Report(
        bundle=str(bundle.path),
        model=manifest.name,
        model_sha256=manifest.files[MODEL].sha256,
        checks=tuple(check for check in checks if check),
        latency=latency,
        host=describe_host(),
    )


def accuracy_name(graph: str = "") -> str:
    """Returns the name of the check of a graph's accuracy; of the bundle's own without a name."""
    return f"accuracy of {graph}" if graph else "accuracy"


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json, report.md and report.junit.xml into a folder, over what was there.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        write_bytes(folder / "report.json", (report.model_dump_json(indent=2) + "\n").encode())
        write_bytes(folder / "report.md", to_markdown(report).encode())
        write_bytes(folder / "report.junit.xml", to_junit(report))
    except OSError as error:
        raise UsageError(f"cannot write the report to {folder}: {error}: choose another folder") from error


def read_report(path: Path) -> Report:
    """Returns the report in a report.json.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = " ".join(str(error).splitlines()[:3])
        raise UsageError(f"{path} is no report.json of `wasi-export validate`: {first}") from error


def _load(bundle: Bundle, threads: int) -> Check:
    Session.open(bundle.model_path, threads=threads)
    manifest = bundle.manifest
    detail = f"opset {manifest.opset}, IR version {manifest.ir_version}, threads {threads}"
    return Check(name="load", status="passed", detail=detail)


def _parity(bundle: Bundle, threshold: float | None, threads: int) -> Check:
    golden = bundle.golden()
    largest = worst(measure_parity(bundle.model_path, golden, threads=threads))
    detail = f"{len(golden.images)} golden images; largest {largest}"
    return at_most("parity error", largest.max_error, threshold, detail)


def _accuracy(
    bundle: Bundle | None, images: ImageSet | None, threads: int, track: Track, path: Path | None = None
) -> AccuracyResult | None:
    """Returns the accuracy of a bundle's model, or of another graph that takes the same input."""
    if bundle is None or images is None:
        return None
    session = Session.open(path or bundle.model_path, threads=threads)
    return measure_accuracy(session, images, Preprocess(bundle.manifest.input), track=track)


def _accuracy_check(
    accuracy: AccuracyResult | None, threshold: float | None, graph: str = ""
) -> Check | None:
    if accuracy is None:
        return without_data("accuracy", threshold, "give --data")
    return Check(
        name=accuracy_name(graph),
        status="info" if threshold is None else "passed" if accuracy.top1 >= threshold else "failed",
        value=accuracy.top1,
        threshold=threshold,
        detail=f"top-1, {accuracy.correct} of {accuracy.total} images right",
    )


def _drop_check(
    accuracy: AccuracyResult | None, baseline: AccuracyResult | None, threshold: float | None
) -> Check | None:
    if accuracy is None or baseline is None:
        return without_data("accuracy drop", threshold, "give --data and --baseline")
    detail = f"baseline {baseline.top1:.4f}, bundle {accuracy.top1:.4f}"
    # Of the counts: 0.90 - 0.89 in floats is above 0.01.
    drop = (baseline.correct - accuracy.correct) / accuracy.total
    return at_most("accuracy drop", drop, threshold, detail)


def _latency_check(latency: Sequence[Latency], threshold: float | None) -> Check | None:
    if not latency:
        return without_data("latency ratio", threshold, "give --baseline")
    baseline, own = latency[:2]
    detail = (
        f"p50 {own.p50_ms:.2f} ms, baseline {baseline.p50_ms:.2f} ms; "
        f"quartiles of the ratio {own.ratio_low:.3f}–{own.ratio_high:.3f}"
    )
    return at_most("latency ratio", own.ratio_to_first, threshold, detail)


def size_check(bundle: Bundle, threshold: float | None) -> Check:
    return at_most("size", bundle.manifest.files[MODEL].size_bytes / 1e6, threshold, MODEL, unit="MB")


def _quantized(bundle: Bundle | None, name: str) -> tuple[tuple[str, Path], ...]:
    """Returns name and file of the graph in smaller numbers that a bundle may have."""
    if bundle is None or bundle.manifest.quantized is None or bundle.quantized_path is None:
        return ()
    return ((f"{name}, {bundle.manifest.quantized.form}", bundle.quantized_path),)


def _quantized_checks(
    bundle: Bundle, accuracy: AccuracyResult | None, accuracies: Mapping[str, AccuracyResult | None]
) -> Iterator[Check]:
    """Yields the checks of the graph in smaller numbers, against what was measured of it at export."""
    facts = bundle.manifest.quantized
    for name, path in _quantized(bundle, "bundle"):
        assert facts is not None
        error = relative_error(path, bundle.golden())
        detail = f"{path.name}; {facts.error:.2g} at export, {QUANTIZED_MARGIN:g} times that is allowed"
        yield at_most(f"{facts.form} error", error, QUANTIZED_MARGIN * facts.error, detail)
        own = accuracies[name]
        if accuracy is not None and own is not None:
            detail = f"fp32 {accuracy.top1:.4f}, {facts.form} {own.top1:.4f}"
            drop = (accuracy.correct - own.correct) / own.total
            yield at_most(f"{facts.form} accuracy drop", drop, None, detail)


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
