"""Is this bundle good enough, on this machine? Every check, its threshold, and one verdict.

integrity → load → parity with the golden data → accuracy → accuracy drop → latency ratio → size → memory.
The integrity of every file was checked when the `Bundle` was opened; nothing of it is read before. How a
value is held against its threshold: `checks.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from wasi_export.artifact import Bundle
from wasi_export.config import Thresholds
from wasi_export.durable import write_bytes
from wasi_export.errors import DataError, HostError, MalformedError, UsageError
from wasi_export.image_set import ImageSet
from wasi_export.junit import to_junit
from wasi_export.manifest import MODEL
from wasi_export.progress import Track, silent
from wasi_export.report import Check, Latency, LayerTime, Report
from wasi_export.runtimes.accuracy import AccuracyResult, Pairs, measure_accuracy
from wasi_export.runtimes.bench import CONFIDENCE, measure_latency
from wasi_export.runtimes.checks import (
    accuracy_check,
    at_most,
    drop_check,
    latency_check,
    left_out_check,
    memory_check,
    size_check,
    without_data,
)
from wasi_export.runtimes.comparison import compare_answers, describe_predictions
from wasi_export.runtimes.footprint import measure_footprint
from wasi_export.runtimes.host import describe_host
from wasi_export.runtimes.layer_profile import compare_layers
from wasi_export.runtimes.parity import measure_parity, relative_error, worst
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session
from wasi_export.untrusted.document import read_document
from wasi_export.views import to_markdown

QUANTIZED_MARGIN = 1.5
"""By how much rounding on another processor may raise the error of a quantised graph."""
Graph = tuple[str, Bundle, Path]
"""Name of a graph, the bundle whose input it takes, and its file."""


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
    drop both. As long as the latency ratio is undecided, the `rounds` are doubled, twice at most. What is
    measured without a threshold is reported for information; so are graphs `beside`, by name, of the bundle's
    input and classes.

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
    graphs = _graphs(bundle, baseline, beside)
    accuracies = {}
    if images is not None:
        accuracies = {name: _accuracy(owner, path, images, threads, track) for name, owner, path in graphs}
    comparison = None
    if images is not None and baseline:
        confidence = thresholds.accuracy_confidence or CONFIDENCE
        comparison = compare_answers(
            images, accuracies["baseline"], accuracies["bundle"], confidence=confidence
        )
    latency: tuple[Latency, ...] = ()
    layers: tuple[LayerTime, ...] = ()
    if baseline:
        layers = compare_layers(baseline.model_path, bundle.model_path, threads=threads, track=track)
        latency = measure_latency(
            [(name, path) for name, _, path in graphs],
            threads=threads,
            rounds=rounds,
            decided=_ratio_is_decided(thresholds.max_latency_ratio),
            track=track,
        )
    checks = (
        integrity,
        load,
        parity,
        left_out_check(images),
        accuracy_check(accuracies.get("bundle"), thresholds),
        _drop_check(accuracies, thresholds),
        latency_check(latency, thresholds.max_latency_ratio),
        size_check(bundle, thresholds.max_size_mb),
        _memory_check(bundle, latency, thresholds.max_memory_mb, threads),
        *_quantized_checks(bundle, accuracies, thresholds),
        *(
            accuracy_check(found, thresholds, name)
            for name, found in accuracies.items()
            if name not in ("baseline", "bundle")
        ),
    )
    classes = manifest.classes
    return Report(
        bundle=str(bundle.path),
        model=manifest.name,
        model_sha256=manifest.files[MODEL].sha256,
        checks=tuple(check for check in checks if check),
        latency=latency,
        classes=classes if accuracies else (),
        predictions=tuple(
            describe_predictions(name, found, len(classes)) for name, found in accuracies.items()
        ),
        comparison=comparison,
        layers=layers,
        host=describe_host(),
    )


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json, report.md and report.junit.xml into a folder, over what was there.

    Raises:
        UsageError: the folder cannot be written.
    """
    write_bytes(folder / "report.json", (report.model_dump_json(indent=2) + "\n").encode())
    write_bytes(folder / "report.md", to_markdown(report).encode())
    write_bytes(folder / "report.junit.xml", to_junit(report))


def read_report(path: Path) -> Report:
    """Returns the report in a report.json.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        return read_document(path, Report, any_text=True)  # names of images are in it
    except (OSError, MalformedError) as error:
        raise UsageError(f"{path} is no report.json of `wasi-export validate`: {error}") from error


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


def _graphs(bundle: Bundle, baseline: Bundle | None, beside: Sequence[tuple[str, Path]]) -> list[Graph]:
    """Returns what is measured: baseline, bundle, their graphs in smaller numbers, and those beside."""
    own: list[Graph] = [("bundle", bundle, bundle.model_path)]
    others = [*_quantized(bundle, "bundle"), *((name, bundle, path) for name, path in beside)]
    if baseline is None:
        return own + others
    dense: list[Graph] = [("baseline", baseline, baseline.model_path)]
    return dense + own + _quantized(baseline, "baseline") + others


def _accuracy(owner: Bundle, path: Path, images: ImageSet, threads: int, track: Track) -> AccuracyResult:
    """Returns the accuracy of a graph that takes the input of a bundle."""
    session = Session.open(path, threads=threads)
    return measure_accuracy(session, images, Preprocess(owner.manifest.input), track=track)


def _ratio_is_decided(threshold: float | None) -> Callable[[Sequence[Latency]], bool] | None:
    """Returns when enough rounds are measured; None where there is nothing to decide."""
    if threshold is None:
        return None

    def decided(latency: Sequence[Latency]) -> bool:
        check = latency_check(latency, threshold)
        return check is not None and check.status != "undecided"

    return decided


def _drop_check(accuracies: Mapping[str, AccuracyResult], limits: Thresholds) -> Check | None:
    name, threshold = "accuracy drop", limits.max_accuracy_drop
    if "baseline" not in accuracies:
        return without_data(name, threshold, "give --data and --baseline")
    before, now = accuracies["baseline"], accuracies["bundle"]
    detail = f"baseline {before.top1:.4f}, bundle {now.top1:.4f}"
    return drop_check(name, Pairs.of(before, now), threshold, limits, detail)


def _memory_check(
    bundle: Bundle, latency: Sequence[Latency], threshold: float | None, threads: int
) -> Check | None:
    """Returns the check of the memory, of the latency's measurement or, where it is asked for, of its own."""
    if latency:
        return memory_check(latency[1].peak_rss_mb, threshold)
    if threshold is None:
        return None
    try:
        return memory_check(measure_footprint(bundle.model_path, threads=threads).peak_rss_mb, threshold)
    except HostError as error:
        return without_data("memory", threshold, str(error))


def _quantized(bundle: Bundle, name: str) -> list[Graph]:
    """Returns the graph in smaller numbers that a bundle may have."""
    if bundle.manifest.quantized is None or bundle.quantized_path is None:
        return []
    return [(f"{name}, {bundle.manifest.quantized.form}", bundle, bundle.quantized_path)]


def _quantized_checks(
    bundle: Bundle, accuracies: Mapping[str, AccuracyResult], limits: Thresholds
) -> Iterator[Check]:
    """Yields the checks of the graph in smaller numbers, against what was measured of it at export."""
    facts = bundle.manifest.quantized
    for name, _, path in _quantized(bundle, "bundle"):
        assert facts is not None
        error = relative_error(path, bundle.golden())
        detail = f"{path.name}; {facts.error:.2g} at export, {QUANTIZED_MARGIN:g} times that is allowed"
        yield at_most(f"{facts.form} error", error, QUANTIZED_MARGIN * facts.error, detail)
        if accuracies:
            before, now = accuracies["bundle"], accuracies[name]
            detail = f"fp32 {before.top1:.4f}, {facts.form} {now.top1:.4f}"
            yield drop_check(f"{facts.form} accuracy drop", Pairs.of(before, now), None, limits, detail)
