import json

import pytest
from helpers import CLASSES, make_bundle, make_images, make_manifest, make_model

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.config import Thresholds
from wasi_export.datasets import load_labelled
from wasi_export.durable import file_sha256
from wasi_export.errors import DataError, ExitCode, UsageError
from wasi_export.manifest import Quantized
from wasi_export.report import Check, Report
from wasi_export.runtimes import footprint
from wasi_export.runtimes.parity import relative_error
from wasi_export.runtimes.validate import read_report, validate, write_report


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


def named(report: Report, name: str) -> Check:
    (found,) = (check for check in report.checks if check.name == name)
    return found


def quantized_bundle(folder, *, promised=1.0, is_left_out=False):
    """Returns a bundle whose int8 graph takes dark for light, or was left out.

    Its manifest promises an error that is `promised` times the real one.
    """
    make_bundle(folder)
    path = folder / "model.int8.onnx"
    path.write_bytes(make_model(sign=-1))
    error = relative_error(path, Bundle(folder, make_manifest()).golden())
    if is_left_out:
        path.unlink()
    facts = Quantized(
        form="int8",
        file=None if is_left_out else path.name,
        error=promised * error,
        accuracy_drop=0.0,
        images=4,
        latency_ratio=0.5,
    )
    write_bundle_manifest(folder, make_manifest().model_copy(update={"quantized": facts}))
    return Bundle.open(folder)


def test_a_bundle_alone_is_checked_for_integrity_load_parity_and_size(bundle):
    report = validate(bundle, Thresholds())
    assert statuses(report) == {
        "integrity": "passed", "load": "passed", "parity error": "passed", "size": "info",
    }  # fmt: skip
    assert (report.exit_code, report.verdict, report.latency) == (ExitCode.PASSED, "passed", ())
    assert report.model_sha256 == file_sha256(bundle.model_path)


def test_loading_tells_what_the_graph_needs_and_on_how_many_threads(bundle):
    assert named(validate(bundle, Thresholds()), "load").detail == "opset 23, IR version 10, threads 1"
    assert named(validate(bundle, Thresholds(), threads=2), "load").detail.endswith("threads 2")


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
    report = validate(turned, Thresholds(max_parity_error=10.0), baseline=baseline, images=images, rounds=1)
    assert report.classes == CLASSES
    assert [(p.model, p.correct, p.total) for p in report.predictions] == [
        ("baseline", 3, 4), ("bundle", 1, 4),
    ]  # fmt: skip
    found = report.comparison
    assert (found.both_right, found.lost, found.won, found.both_wrong, found.changed) == (0, 3, 1, 0, 4)
    assert {image.image.split("/")[0] for image in found.images} == set(CLASSES)
    assert found.drop == 0.5
    drop = named(report, "accuracy drop")
    assert (drop.value, drop.interval, drop.p_value) == (found.drop, found.interval, found.p_value)
    assert validate(turned, Thresholds(), images=images).comparison is None


def test_a_comparison_is_as_sure_as_the_gates(bundle, baseline, images):
    for limits, confidence in [({}, 0.95), ({"min_accuracy": 0.1, "accuracy_confidence": 0.99}, 0.99)]:
        report = validate(bundle, Thresholds(**limits), baseline=baseline, images=images, rounds=1)
        assert report.comparison.confidence == confidence
        assert named(report, "accuracy drop").confidence == confidence


@pytest.mark.parametrize(
    ("limit", "rounds", "measured"),
    [
        (None, None, 30),
        (None, 1, 1),
        (1e6, 8, 8),
        (1e-6, 8, 8),
        (1e6, 1, 4),  # an interval takes 7 rounds, so this is doubled, twice at most
    ],
)
def test_rounds_are_doubled_as_long_as_the_ratio_is_undecided(bundle, baseline, limit, rounds, measured):
    given = {} if rounds is None else {"rounds": rounds}
    report = validate(bundle, Thresholds(max_latency_ratio=limit), baseline=baseline, **given)
    assert [len(latency.samples_ms) for latency in report.latency] == [measured] * 2


@pytest.mark.parametrize(("promised", "status"), [(1 / 1.4, "passed"), (1 / 1.6, "failed"), (2, "passed")])
def test_a_quantised_graph_may_err_half_as_much_again_as_at_export(tmp_path, promised, status):
    bundle = quantized_bundle(tmp_path / "bundle", promised=promised)
    report = validate(bundle, Thresholds())
    check = named(report, "int8 error")
    assert check.status == status
    assert check.threshold == pytest.approx(1.5 * promised * check.value)
    assert "int8 accuracy drop" not in statuses(report)


def test_a_quantised_graph_is_measured_beside_those_in_fp32(tmp_path, images):
    bundle, dense = (quantized_bundle(tmp_path / name) for name in ("small", "dense"))
    report = validate(bundle, Thresholds(), baseline=dense, images=images, rounds=1)
    graphs = ["baseline", "bundle", "baseline, int8", "bundle, int8"]
    assert [latency.model for latency in report.latency] == graphs
    assert [p.model for p in report.predictions] == graphs
    drop = named(report, "int8 accuracy drop")
    assert (drop.status, drop.value) == ("info", 0.5)
    assert drop.detail.startswith("fp32 0.7500, int8 0.2500")


def test_a_quantised_graph_that_was_left_out_is_not_checked(tmp_path, bundle):
    left_out = quantized_bundle(tmp_path / "left out", is_left_out=True)
    report = validate(left_out, Thresholds())
    assert statuses(report) == statuses(validate(bundle, Thresholds()))


def test_memory_that_the_system_does_not_tell_is_no_data(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "STATUS", tmp_path / "absent")
    report = validate(bundle, Thresholds(max_memory_mb=1e6))
    assert named(report, "memory").status == "no data"
    assert "measure on Linux" in named(report, "memory").detail
    assert report.exit_code == ExitCode.NOTHING_TO_CHECK


def test_another_graph_is_measured_beside_for_information(bundle, baseline, images):
    beside = [("other", baseline.model_path)]
    report = validate(bundle, Thresholds(), baseline=baseline, images=images, beside=beside, rounds=3)
    other = named(report, "accuracy of other")
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
    parity = named(validate(bundle, Thresholds()), "parity error")
    assert parity.status == "failed"
    assert parity.value == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("classes", [("cat", "dog"), ("light", "dark")])
def test_a_baseline_with_other_classes_is_refused(bundle, tmp_path, classes):
    other = Bundle.open(make_bundle(tmp_path / "other", classes=classes))
    with pytest.raises(DataError, match="other classes than"):
        validate(bundle, Thresholds(), baseline=other)


def test_a_written_report_loads_as_what_was_measured(bundle, baseline, tmp_path):
    report = validate(bundle, Thresholds(), baseline=baseline, rounds=3)
    write_report(report, tmp_path / "new" / "report")
    text = (tmp_path / "new" / "report" / "report.json").read_text()
    assert Report.model_validate_json(text) == report
    assert len(json.loads(text)["latency"][0]["samples_ms"]) == 3
    assert text.startswith('{\n  "')  # a person can read it, too
    assert (tmp_path / "new" / "report" / "report.md").read_text().startswith("# ✅ tiny: passed\n")


def test_a_report_that_cannot_be_written_says_so(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*report\.json"):
        write_report(validate(bundle, Thresholds()), tmp_path / "file")


def test_a_report_is_read_back_with_names_that_a_terminal_obeys(bundle, tmp_path):
    report = validate(bundle, Thresholds()).model_copy(update={"bundle": "\x1b[2J"})
    write_report(report, tmp_path)
    assert read_report(tmp_path / "report.json") == report


@pytest.mark.parametrize("text", [None, "", "{}", '{"bundle": 1}'])
def test_what_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=r"report\.json is no report\.json of `wasi-export validate`: "):
        read_report(path)
