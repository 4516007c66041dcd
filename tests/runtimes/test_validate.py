import json

import pytest
from helpers import CLASSES, make_bundle, make_images, make_model

from wasi_export.artifact import Bundle
from wasi_export.config import Thresholds
from wasi_export.datasets import load_labelled
from wasi_export.durable import file_sha256
from wasi_export.errors import DataError, ExitCode, UsageError
from wasi_export.report import Report
from wasi_export.runtimes.validate import validate, write_report


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(make_bundle(tmp_path / "bundle"))


@pytest.fixture
def baseline(tmp_path):
    return Bundle.open(make_bundle(tmp_path / "baseline"))


@pytest.fixture
def images(tmp_path):
    return load_labelled(str(make_images(tmp_path / "data", wrong=1)), CLASSES)


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def test_a_bundle_alone_is_checked_for_integrity_load_parity_and_size(bundle):
    report = validate(bundle, Thresholds())
    assert statuses(report) == {
        "integrity": "passed", "load": "passed", "parity error": "passed", "size": "info",
    }  # fmt: skip
    assert (report.exit_code, report.verdict, report.latency) == (ExitCode.PASSED, "passed", ())
    assert report.model_sha256 == file_sha256(bundle.model_path)


def test_what_is_measured_without_a_threshold_is_for_information(bundle, baseline, images):
    report = validate(bundle, Thresholds(), baseline=baseline, images=images, rounds=3)
    values = {check.name: check.value for check in report.checks if check.status == "info"}
    assert values["accuracy"] == 0.75
    assert values["accuracy drop"] == 0
    assert values["latency ratio"] == report.latency[1].ratio_to_first
    assert values["size"] == bundle.model_path.stat().st_size / 1e6
    assert values["memory"] == report.latency[1].peak_rss_mb
    assert [latency.model for latency in report.latency] == ["baseline", "bundle"]
    assert report.exit_code == ExitCode.PASSED


def test_answers_of_baseline_and_bundle_are_in_the_report(tmp_path, baseline, images):
    """The bundle takes dark for light: it loses what the baseline has right, and wins the rest."""
    turned = Bundle.open(make_bundle(tmp_path / "turned", model=make_model(sign=-1)))
    report = validate(turned, Thresholds(max_parity_error=None), baseline=baseline, images=images, rounds=1)
    assert report.classes == CLASSES
    assert [(p.model, p.correct, p.total) for p in report.predictions] == [
        ("baseline", 3, 4), ("bundle", 1, 4),
    ]  # fmt: skip
    found = report.comparison
    assert (found.both_right, found.lost, found.won, found.both_wrong, found.changed) == (0, 3, 1, 0, 4)
    assert {image.image.split("/")[0] for image in found.images} == set(CLASSES)
    assert found.drop == 0.5
    (drop,) = (check for check in report.checks if check.name == "accuracy drop")
    assert (drop.value, drop.interval, drop.p_value) == (found.drop, found.interval, found.p_value)
    assert validate(turned, Thresholds(), images=images).comparison is None


def test_another_graph_is_measured_beside_for_information(bundle, baseline, images):
    beside = [("other", baseline.model_path)]
    report = validate(bundle, Thresholds(), baseline=baseline, images=images, beside=beside, rounds=3)
    (other,) = (check for check in report.checks if check.name == "accuracy of other")
    assert (other.status, other.value) == ("info", 0.75)
    assert [latency.model for latency in report.latency] == ["baseline", "bundle", "other"]
    assert "accuracy of other" not in statuses(validate(bundle, Thresholds(), beside=beside))


@pytest.mark.parametrize(
    ("name", "met", "missed"),
    [
        ("accuracy", {"min_accuracy": 0.75}, {"min_accuracy": 0.76}),
        ("accuracy drop", {"max_accuracy_drop": 0.0}, {"max_accuracy_drop": -0.01}),
        ("latency ratio", {"max_latency_ratio": 1e6}, {"max_latency_ratio": 1e-6}),
        ("size", {"max_size_mb": 1.0}, {"max_size_mb": 1e-5}),
        ("memory", {"max_memory_mb": 1e6}, {"max_memory_mb": 1.0}),
        ("parity error", {"max_parity_error": 1e-6}, {"max_parity_error": 1e-12}),
    ],
)
def test_each_threshold_decides(bundle, baseline, images, name, met, missed):
    for limits, status, code in [(met, "passed", ExitCode.PASSED), (missed, "failed", ExitCode.CHECK_FAILED)]:
        thresholds = Thresholds(**limits)
        twin = baseline if name in {"accuracy drop", "latency ratio"} else None
        report = validate(bundle, thresholds, baseline=twin, images=images, rounds=3)
        assert statuses(report)[name] == status
        assert report.exit_code == code
        assert (name in report.verdict) == (status == "failed")


@pytest.mark.parametrize(
    ("name", "limit", "given"),
    [
        ("accuracy", {"min_accuracy": 0.0}, []),
        ("accuracy", {"min_accuracy": 0.0}, ["baseline"]),
        ("accuracy drop", {"max_accuracy_drop": 1.0}, ["images"]),
        ("accuracy drop", {"max_accuracy_drop": 1.0}, ["baseline"]),
        ("latency ratio", {"max_latency_ratio": 1e6}, ["images"]),
    ],
)
def test_a_threshold_without_data_never_passes(bundle, baseline, images, name, limit, given):
    report = validate(
        bundle,
        Thresholds(**limit),
        baseline=baseline if "baseline" in given else None,
        images=images if "images" in given else None,
        rounds=1,
    )
    assert statuses(report)[name] == "no data"
    assert report.exit_code == ExitCode.NOTHING_TO_CHECK
    assert report.verdict == f"nothing to check for: {name}"


def test_a_golden_output_that_is_off_fails_parity(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", golden_error=1e-3))
    (parity,) = (c for c in validate(bundle, Thresholds()).checks if c.name == "parity error")
    assert parity.status == "failed"
    assert parity.value == pytest.approx(1e-3, rel=0.1)


def test_a_baseline_with_other_classes_is_refused(bundle, tmp_path):
    other = Bundle.open(make_bundle(tmp_path / "other", classes=("cat", "dog")))
    with pytest.raises(DataError, match="other classes than"):
        validate(bundle, Thresholds(), baseline=other)


def test_a_written_report_loads_as_what_was_measured(bundle, baseline, tmp_path):
    report = validate(bundle, Thresholds(), baseline=baseline, rounds=3)
    write_report(report, tmp_path / "new" / "report")
    assert Report.model_validate_json((tmp_path / "new" / "report" / "report.json").read_bytes()) == report
    assert (
        len(json.loads((tmp_path / "new/report/report.json").read_bytes())["latency"][0]["samples_ms"]) == 3
    )
    assert (tmp_path / "new" / "report" / "report.md").read_text().startswith("# ✅ tiny: passed\n")


def test_a_report_that_cannot_be_written_says_so(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*report\.json"):
        write_report(validate(bundle, Thresholds()), tmp_path / "file")
