import json
import shutil

import pytest
from helpers import make_bundle, make_images, make_model, require_schema
from typer.main import get_command
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.config import Thresholds
from wasi_export.manifest import GOLDEN
from wasi_export.report import Report


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def run(*arguments):
    return CliRunner().invoke(app, ["validate", *map(str, arguments)])


def error_of(result) -> str:
    """Returns the one line on stderr."""
    (line,) = result.stderr.splitlines()
    return line


def flip_a_byte(bundle):
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(data)


def truncate(bundle):
    data = (bundle / GOLDEN).read_bytes()
    (bundle / GOLDEN).write_bytes(data[:-1])


def remove_a_file(bundle):
    (bundle / "config.toml").unlink()


def add_a_file(bundle):
    (bundle / "notes.txt").write_text("")


def remove_the_manifest(bundle):
    (bundle / "manifest.json").unlink()


def remove_everything(bundle):
    shutil.rmtree(bundle)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (flip_a_byte, "model.onnx has sha256"),
        (truncate, "golden/golden.safetensors has "),
        (remove_a_file, "config.toml is missing"),
        (add_a_file, "notes.txt is not in the manifest"),
        (remove_the_manifest, "has no manifest.json"),
        (remove_everything, "no bundle at"),
    ],
)
@pytest.mark.parametrize("command", ["validate", "inspect", "bench"])
def test_a_damaged_bundle_is_refused_with_exit_code_6(bundle, damage, line, command):
    damage(bundle)
    result = CliRunner().invoke(app, [command, str(bundle)])
    assert result.exit_code == 6
    assert line in error_of(result)
    assert str(bundle) in error_of(result)
    assert result.stdout == ""


def test_a_bundle_passes_and_says_so(bundle):
    result = run(bundle)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "tiny: passed" in result.stdout
    assert "parity error" in result.stdout


def test_all_thresholds_met_with_data_and_baseline(bundle, tmp_path):
    baseline = make_bundle(tmp_path / "baseline")
    images = make_images(tmp_path / "data")
    limits = tmp_path / "limits.toml"
    limits.write_text("min_accuracy = 1.0\nmax_accuracy_drop = 0.0\nmax_latency_ratio = 1e6\n")
    given = ("--data", images, "--limit", 3, "--baseline", baseline, "--thresholds", limits, "--rounds", 3)
    result = run(bundle, *given, "--max-size-mb", 1, "--json")
    assert result.exit_code == 0
    require_schema("report", result.stdout)
    report = Report.model_validate_json(result.stdout)
    assert [check.name for check in report.checks if check.status == "passed"] == [
        "integrity", "load", "parity error", "accuracy", "accuracy drop", "latency ratio", "size",
    ]  # fmt: skip
    assert report.comparison.changed == 0


def test_every_threshold_is_an_option_and_documented():
    parameters = {parameter.name: parameter for parameter in get_command(app).commands["validate"].params}
    for name, field in Thresholds.model_fields.items():
        assert field.description, name
        assert parameters[name].help, name


def test_github_gets_annotations_and_a_summary(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    (tmp_path / "summary").write_text("what was there before\n")
    result = run(bundle, "--max-size-mb", 1e-6, "--min-accuracy", 0.5, "--github")
    assert result.exit_code == 1
    lines = [line for line in result.stdout.splitlines() if line.startswith("::")]
    assert lines[0] == "::warning title=tiny%3A accuracy::no data: –, threshold 0.5: give --data"
    assert lines[1].startswith("::error title=tiny%3A size::failed: ")
    assert lines[2:] == ["::notice title=tiny::failed: size; nothing to check for: accuracy"]
    summary = (tmp_path / "summary").read_text(encoding="utf-8")
    assert summary.startswith("what was there before\n# ❌ tiny: failed: size")


def test_github_gets_an_error_as_an_annotation(bundle):
    flip_a_byte(bundle)
    result = run(bundle, "--github")
    assert result.exit_code == 6
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"::error title={bundle}::")
    assert "model.onnx has sha256" in line


def test_annotations_and_json_do_not_go_together(bundle):
    result = run(bundle, "--github", "--json")
    assert result.exit_code == 2
    assert error_of(result).startswith("error: --github and --json both print to stdout")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--limit", 3), "--limit=3 needs --data"),
        (("--steps", 200), "--steps=200 needs --target"),
        (("--seconds", 5, "--steps", 3), "--steps=3, --seconds=5.0 need --target"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(bundle, options, line):
    result = run(bundle, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert error_of(result) == f"error: {line}: give it too, or leave out what needs it"


def test_a_missed_threshold_exits_1(bundle):
    result = run(bundle, "--max-size-mb", 1e-6)
    assert (result.exit_code, result.stderr) == (1, "")
    assert "tiny: failed: size" in result.stdout


def test_an_option_overrides_the_threshold_of_the_file(bundle, tmp_path):
    limits = tmp_path / "limits.toml"
    limits.write_text("max_size_mb = 1e-6\n")
    assert run(bundle, "--thresholds", limits).exit_code == 1
    assert run(bundle, "--thresholds", limits, "--max-size-mb", 1).exit_code == 0


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ("--min-accuracy", "give --data"),
        ("--max-accuracy-drop", "give --data and --baseline"),
        ("--max-latency-ratio", "give --baseline"),
    ],
)
def test_a_threshold_without_data_exits_5(bundle, option, remedy):
    result = run(bundle, option, 0.5)
    assert result.exit_code == 5
    assert "tiny: nothing to check for:" in result.stdout
    assert remedy in result.stdout


def test_an_empty_folder_of_images_exits_5(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(bundle, "--data", tmp_path / "empty")
    assert result.exit_code == 5
    assert error_of(result).startswith(f"error: no images in {tmp_path / 'empty'}: expected")


def test_a_file_that_is_no_image_exits_2_and_is_named(bundle, tmp_path):
    images = make_images(tmp_path / "data")
    (images / "dark" / "notes.jpg").write_text("not a picture")
    result = run(bundle, "--data", images)
    assert result.exit_code == 2
    assert "cannot be read: dark/notes.jpg (no image)" in error_of(result)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("min_acuracy = 0.5", "unknown key 'min_acuracy', did you mean 'min_accuracy'?"),
        ("min_accuracy = 1.7", "min_accuracy: Input should be less than or equal to 1, got 1.7"),
        ("min_accuracy", "is not TOML"),
    ],
)
def test_a_wrong_threshold_file_exits_2(bundle, tmp_path, text, line):
    (tmp_path / "limits.toml").write_text(text)
    result = run(bundle, "--thresholds", tmp_path / "limits.toml")
    assert result.exit_code == 2
    assert line in error_of(result)


def test_a_threshold_option_out_of_range_exits_2(bundle):
    result = run(bundle, "--min-accuracy", 1.7)
    assert result.exit_code == 2
    assert error_of(result) == (
        "error: thresholds: min_accuracy: Input should be less than or equal to 1, got 1.7"
    )


def test_a_model_newer_than_onnxruntime_exits_3(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", model=make_model(opset=99))
    result = run(bundle)
    assert result.exit_code == 3
    assert "has opset 99, onnxruntime " in error_of(result)


def test_a_model_that_does_not_load_exits_4(tmp_path):
    wrong = make_model().replace(b"code", b"cope", 1)  # an output that the next operator does not find
    result = run(make_bundle(tmp_path / "bundle", model=wrong), "--json")
    assert result.exit_code == 4
    assert "does not load in onnxruntime" in error_of(result)
    require_schema("error", result.stdout)
    assert json.loads(result.stdout)["error"]["exit_code"] == 4


def test_the_report_is_written_also_when_a_threshold_is_missed(bundle, tmp_path):
    result = run(bundle, "--max-size-mb", 1e-6, "--report", tmp_path / "report")
    assert result.exit_code == 1
    assert f"report: {tmp_path / 'report'}" in result.stdout
    require_schema("report", (tmp_path / "report" / "report.json").read_bytes())
    assert Report.model_validate_json((tmp_path / "report" / "report.json").read_bytes()).exit_code == 1
    assert (tmp_path / "report" / "report.md").read_text().startswith("# ❌ tiny: failed: size\n")
