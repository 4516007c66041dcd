"""Commands on a target, which here is another Python of this machine: what is sent, checked and told."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import make_images

from wasi_export.artifact import Bundle
from wasi_export.config import Thresholds
from wasi_export.datasets import load_labelled
from wasi_export.errors import HostError, ModelFailedError, UsageError
from wasi_export.report import Check, Host, Instructions
from wasi_export.runtimes.elsewhere.adapt import adapt_elsewhere
from wasi_export.runtimes.elsewhere.bench import bench_elsewhere
from wasi_export.runtimes.elsewhere.data import data_on
from wasi_export.runtimes.elsewhere.validate import (
    Elsewhere,
    _accuracy_there,
    _count_checks,
    _invalid,
    validate_elsewhere,
)
from wasi_export.runtimes.host import describe_host
from wasi_export.runtimes.instructions import estimate_ms
from wasi_export.runtimes.targets.target import LocalTarget, document_of, output_of


@pytest.fixture
def there(tmp_path):
    return LocalTarget("there", "device", Path(sys.executable), os.environ, tmp_path / "scratch")


def test_everything_is_checked_there_and_compared_with_here(there, learning_bundle, tmp_path):
    bundle = Bundle.open(learning_bundle)
    asked = Elsewhere(baseline=bundle, data=str(make_images(tmp_path / "images")), rounds=3, steps=5)
    thresholds = Thresholds(
        min_accuracy=1, max_accuracy_drop=0, max_latency_ratio=100, max_size_mb=1, max_memory_mb=1000
    )
    report = validate_elsewhere(there, bundle, thresholds, asked)
    assert report.verdict == "passed"
    names = [check.name for check in report.checks]
    assert names[0] == "integrity"
    assert {"load", "accuracy", "accuracy drop", "latency ratio", "size", "memory"} <= set(names)
    assert [found.model for found in report.predictions] == ["baseline", "bundle"]
    assert (report.comparison.both_right, report.comparison.changed) == (4, 0)
    assert names[-2:] == ["model.onnx as here", "training as here"]
    assert report.target == "there"
    assert len(report.latency) == 2
    assert list(there.scratch.iterdir()) == []


@pytest.mark.parametrize(("data", "status"), [(True, "passed"), (False, "no data")])
def test_an_emulated_board_is_asked_for_its_accuracy_alone(there, finished_bundle, tmp_path, data, status):
    """Whatever the other thresholds are: they are of its clock, or were judged by its outputs."""
    bundle, host = Bundle.open(finished_bundle), describe_host()
    asked = Elsewhere(baseline=bundle, data=str(make_images(tmp_path / "images")) if data else None)
    limits = Thresholds(
        min_accuracy=0.5,
        max_accuracy_drop=0,
        accuracy_confidence=0.9,
        max_latency_ratio=1e-9,
        max_size_mb=1e-9,
    )
    report = _accuracy_there(there, str(finished_bundle), bundle, limits, asked, tmp_path, host)
    assert [(check.name, check.status) for check in report.checks] == [("accuracy", status)]
    assert [found.correct for found in report.predictions] == ([4] if data else [])
    assert report.latency == ()


def test_a_limit_that_is_missed_there_fails(there, finished_bundle):
    report = validate_elsewhere(
        there, Bundle.open(finished_bundle), Thresholds(max_size_mb=1e-6), Elsewhere(steps=0)
    )
    assert report.verdict == "failed: size"


@pytest.mark.parametrize(("threshold", "status"), [(0.5, "no data"), (None, "info")])
def test_a_latency_of_a_board_that_was_throttled_is_none(threshold, status):
    measured = Check(
        name="latency ratio",
        status="passed",
        value=0.4,
        threshold=threshold,
        interval=(0.3, 0.5),
        confidence=0.95,
    )
    found = _invalid(measured, "throttled")
    assert (found.status, found.value, found.interval, found.detail) == (status, None, None, "throttled")


def test_an_error_there_is_an_error_here_of_the_same_kind(there, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ModelFailedError, match=r"on there: .*bad.onnx does not load"):
        bench_elsewhere(there, [("bad", tmp_path / "bad.onnx")], batch=1, threads=1, rounds=1, warmup=0)


def test_a_program_that_dies_is_told(there):
    with pytest.raises(ModelFailedError, match=r"on there: .*killed by signal 9"):
        output_of(there, ("-c", "import os; os.kill(os.getpid(), 9)"), seconds=30)


def test_a_program_that_takes_too_long_is_stopped(there):
    with pytest.raises(HostError, match=r"on there took longer than 0\.5 s and was stopped"):
        output_of(there, ("-c", "import time; time.sleep(60)"), seconds=0.5)


def test_a_named_source_is_written_for_the_target(there, tmp_path):
    classes = tuple("0123456789")
    path = data_on(there, "digits", classes, tmp_path)
    own, sent = load_labelled("digits", classes), load_labelled(path, classes)
    np.testing.assert_array_equal(sent.labels, own.labels)
    np.testing.assert_array_equal(np.asarray(sent.read(3)), np.asarray(own.read(3)))


def count(total: int, model: str = "bundle") -> Instructions:
    return Instructions(
        model=model,
        batch=1,
        total=total,
        simd=0,
        fmla=0,
        dot=0,
        load_store=0,
        branch=0,
        ratio_to_first=1,
        estimate_ms=(1, 2),
    )


@pytest.mark.parametrize(("total", "status"), [(1020, "passed"), (1021, "failed"), (900, "passed")])
def test_instructions_may_grow_by_two_percent(there, finished_bundle, total, status):
    report = validate_elsewhere(
        there, Bundle.open(finished_bundle), Thresholds(), Elsewhere(steps=0)
    ).model_copy(update={"instructions": (count(1000),)})
    (check,) = _count_checks([count(total)], report)
    assert check.status == status
    (unknown,) = _count_checks([count(total, "another")], report)
    assert unknown.status == "no data"
    assert list(_count_checks([count(total)], None)) == []


def test_the_estimate_goes_by_what_is_begun_last():
    counts = {"total": 4_800_000, "simd": 4_800_000, "load_store": 0}
    assert estimate_ms(counts) == pytest.approx((1 / 0.9, 1 / 0.7))
    assert estimate_ms(counts | {"simd": 0}) == pytest.approx((0.5 / 0.9, 0.5 / 0.7))


def test_instructions_of_more_threads_are_refused(tmp_path):
    emulated = LocalTarget("emulated", "emulated", Path(sys.executable), os.environ, tmp_path)
    with pytest.raises(UsageError, match="--threads 2"):
        bench_elsewhere(emulated, [], batch=1, threads=2, rounds=1, warmup=0)


def test_a_program_that_prints_something_else_is_told(there):
    with pytest.raises(HostError, match=r"there gave no Host but 'hello\\n'"):
        document_of(there, Host, ("-c", "print('hello')"))


def test_a_state_that_is_there_is_not_sent_again(there, learning_bundle, tmp_path, monkeypatch):
    images = str(make_images(tmp_path / "images"))
    sent: list[Path] = []
    send = LocalTarget.send
    monkeypatch.setattr(LocalTarget, "send", lambda target, path: (sent.append(path), send(target, path))[1])
    for _ in range(2):
        adapt_elsewhere(
            there, Bundle.open(learning_bundle), {"--data": images, "--val": images}, (), tmp_path / "state"
        )
    assert sent == [learning_bundle, learning_bundle]
    assert (tmp_path / "state" / "state.safetensors").is_file()
