"""Is this bundle good enough on another machine, and does it compute there what it computes here?

On a board everything that `validate` does is done there. On an emulated one no clock is believed: outputs,
training and integrity are checked, and instructions are counted in place of a latency.
"""

import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wasi_export.artifact import Bundle
from wasi_export.config import Thresholds
from wasi_export.errors import HostError
from wasi_export.manifest import MODEL
from wasi_export.report import Check, Host, Instructions, Report
from wasi_export.runtimes import reproduce
from wasi_export.runtimes.checks import at_most, size_check, without_data
from wasi_export.runtimes.elsewhere.data import data_on
from wasi_export.runtimes.host import describe_host
from wasi_export.runtimes.instructions import count_instructions
from wasi_export.runtimes.targets.target import RUN_SECONDS, Target, document_of
from wasi_export.untrusted.tensors import load_unchecked

INSTRUCTION_GROWTH = 0.02
"""By how much the instructions of a model may grow from one report to the next."""


@dataclass(frozen=True)
class Elsewhere:
    """What is asked of a target, beside the thresholds."""

    baseline: Bundle | None = None
    data: str | None = None
    limit: int | None = None
    threads: int = 1
    rounds: int = 30
    steps: int = 200
    """Of training, at most."""
    seconds: float = 30.0
    """After which no image and no step is begun, for each graph."""
    before: Report | None = None
    """An earlier report, whose instructions the models may not exceed."""


def validate_elsewhere(target: Target, bundle: Bundle, thresholds: Thresholds, asked: Elsewhere) -> Report:
    """Returns the report of all checks on a target.

    Raises:
        HostError: the target is lost, or has another version of onnxruntime.
        WasiExportError: what `validate` raises there.
    """
    with tempfile.TemporaryDirectory() as folder:
        there = target.send(bundle.path)
        results, host = _results(target, there, asked, Path(folder) / "results")
        counts: tuple[Instructions, ...] = ()
        if target.evidence == "device":
            found = _validate_there(target, there, bundle, thresholds, asked, Path(folder))
            checks = list(found.checks)
        else:
            found = _accuracy_there(target, there, bundle, thresholds, asked, Path(folder), host)
            checks = [*_checks(bundle, thresholds, results), *found.checks]
        checks += reproduce.compare(bundle, results, name=target.name)
        if target.evidence == "emulated":
            counts = count_instructions(target, _models(bundle, asked.baseline), seconds=RUN_SECONDS)
            checks += _count_checks(counts, asked.before)
    return found.model_copy(
        update={
            "target": target.name,
            "bundle": str(bundle.path),
            "checks": tuple(check.model_copy(update={"evidence": target.evidence}) for check in checks),
            "instructions": counts,
            "host": host.model_copy(update={"evidence": target.evidence}),
        }
    )


def _results(target: Target, there: str, asked: Elsewhere, folder: Path) -> tuple[reproduce.Tensors, Host]:
    """Returns what a target computes of a bundle, and what machine it is."""
    scratch = target.folder(f"reproduce-{secrets.token_hex(8)}")
    module = ("-m", reproduce.__name__, there, f"{scratch}/results.safetensors")
    try:
        host, _ = document_of(target, Host, (*module, f"{asked.seconds:g}", str(asked.steps)))
        target.fetch(scratch, folder)
    finally:
        target.remove(scratch)
    own, other = (facts["onnxruntime"] for facts in (describe_host().versions, host.versions))
    if own != other:
        raise HostError(
            f"{target.name} has onnxruntime {other}, this machine {own}: compare the same version"
        )
    return load_unchecked(folder / "results.safetensors", "results of a machine"), host


def _validate_there(
    target: Target, there: str, bundle: Bundle, thresholds: Thresholds, asked: Elsewhere, folder: Path
) -> Report:
    """Returns the report of `validate` on a target."""
    arguments = ["-m", "wasi_export", "validate", there, f"--threads={asked.threads}", "--json"]
    if asked.baseline:
        arguments += ["--baseline", target.send(asked.baseline.path), f"--rounds={asked.rounds}"]
    for name, value in thresholds:
        arguments += [] if value is None else [f"--{name.replace('_', '-')}={value}"]
    if asked.data:
        arguments += ["--data", data_on(target, asked.data, bundle.manifest.classes, folder)]
        arguments += [f"--limit={asked.limit}"] if asked.limit else []
    report, ended = document_of(target, Report, arguments)
    report = report.model_copy(update={"board": ended.board})
    return _without_times(report, ended.board.problems) if ended.board and ended.board.problems else report


def _accuracy_there(
    target: Target,
    there: str,
    bundle: Bundle,
    thresholds: Thresholds,
    asked: Elsewhere,
    folder: Path,
    host: Host,
) -> Report:
    """Returns the report of an emulated board on accuracy alone, which needs neither clock nor baseline."""
    threshold = thresholds.min_accuracy
    if asked.data is None:
        missing = without_data("accuracy", threshold, "give --data")
        return Report(
            bundle=str(bundle.path),
            model=bundle.manifest.name,
            model_sha256=bundle.manifest.files[MODEL].sha256,
            checks=(missing,) if missing else (),
            host=host,
        )
    limits = Thresholds(
        min_accuracy=threshold,
        accuracy_confidence=None if threshold is None else thresholds.accuracy_confidence,
    )
    report = _validate_there(target, there, bundle, limits, replace(asked, baseline=None), folder)
    checks = tuple(check for check in report.checks if "accuracy" in check.name)
    return report.model_copy(update={"checks": checks})


def _without_times(report: Report, problems: Sequence[str]) -> Report:
    """Returns a report without what was timed: it says nothing of the board."""
    reason = f"not valid: {', '.join(problems)}"
    checks = tuple(_invalid(check, reason) if "latency" in check.name else check for check in report.checks)
    return report.model_copy(update={"checks": checks, "latency": (), "layers": ()})


def _invalid(check: Check, reason: str) -> Check:
    """Returns a check of a latency without its value."""
    status = "info" if check.threshold is None else "no data"
    gone = {"value": None, "interval": None, "confidence": None}
    return check.model_copy(update={"status": status, "detail": reason} | gone)


def _checks(bundle: Bundle, thresholds: Thresholds, results: reproduce.Tensors) -> Iterator[Check]:
    """Yields the checks of an emulated board that need no clock and no images."""
    files = f"{len(bundle.manifest.files)} files as in the manifest, opened there"
    yield Check(name="integrity", status="passed", detail=files)
    outputs, golden = results[MODEL], bundle.golden()
    error = reproduce.difference(golden.outputs[: len(outputs)], outputs)
    detail = f"{len(outputs)} of {len(golden.images)} golden images"
    yield at_most("parity error", error, thresholds.max_parity_error, detail)
    yield size_check(bundle, thresholds.max_size_mb)
    for name, threshold in (
        ("accuracy drop", thresholds.max_accuracy_drop),
        ("latency ratio", thresholds.max_latency_ratio),
        ("memory", thresholds.max_memory_mb),
    ):
        if missing := without_data(name, threshold, "of no emulated board: give --target ssh://user@host"):
            yield missing


def _models(bundle: Bundle, baseline: Bundle | None) -> list[tuple[str, Path]]:
    """Returns name and file of what is counted, the baseline first."""
    models = [("baseline", baseline.model_path)] if baseline else []
    models.append(("bundle", bundle.model_path))
    if bundle.quantized_path and bundle.manifest.quantized:
        models.append((f"bundle, {bundle.manifest.quantized.form}", bundle.quantized_path))
    return models


def _count_checks(counts: Sequence[Instructions], before: Report | None) -> Iterator[Check]:
    """Yields the check of each model's instructions against those of an earlier report."""
    if before is None:
        return
    earlier = {count.model: count for count in before.instructions}
    for count in counts:
        name = f"instructions of {count.model}"
        if count.model not in earlier:
            yield Check(
                name=name, status="no data", threshold=INSTRUCTION_GROWTH, detail="not in the earlier report"
            )
            continue
        old = earlier[count.model].total
        detail = f"{count.total / 1e6:.1f} M, before {old / 1e6:.1f} M: growth"
        yield at_most(name, (count.total - old) / old, INSTRUCTION_GROWTH, detail)
