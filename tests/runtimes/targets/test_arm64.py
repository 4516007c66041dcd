"""The real aarch64 wheels, on an emulated Raspberry Pi, from the command line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import factors, make_bundle, make_images, make_model
from onnx import load_from_string, numpy_helper
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.runtimes.instructions import count_instructions
from wasi_export.runtimes.targets.target import output_of

pytestmark = pytest.mark.slow


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def wrong_model() -> bytes:
    """Returns the model with one weight changed."""
    model = load_from_string(make_model())
    (left,) = (tensor for tensor in model.graph.initializer if tensor.name == "left")
    changed = factors()["left"]
    changed[0, 0] += 0.01
    left.CopyFrom(numpy_helper.from_array(changed, "left"))
    return model.SerializeToString()


def test_a_bundle_is_validated_on_a_pi_5(pi5, learning_bundle, tmp_path):
    done = run("validate", learning_bundle, "--target", "arm64", "--json", "--report", tmp_path)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["host"]["machine"] == "Raspberry Pi 5, emulated, aarch64"
    assert report["host"]["processor"] == "Cortex-A76"
    assert {check["evidence"] for check in report["checks"]} == {"emulated"}
    found = {check["name"]: check for check in report["checks"]}
    assert "200 steps" in found["training as here"]["detail"]
    assert report["latency"] == []
    assert "emulated" in (tmp_path / "report.md").read_text(encoding="utf-8")

    # The instructions of the same model are those of before; of a longer one they are more.
    words = ("validate", learning_bundle, "--target", "arm64", "--before", tmp_path / "report.json")
    again = run(*words, "--steps", 0)
    assert again.exit_code == 0, again.stdout
    report["instructions"][0]["total"] //= 2
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    grown = run(*words, "--steps", 0)
    assert grown.exit_code == 1
    assert "failed: instructions of bundle" in grown.stdout


def test_a_changed_weight_fails_on_a_pi_5(pi5, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", model=wrong_model())
    done = run("validate", bundle, "--target", "arm64")
    assert done.exit_code == 1
    assert "failed: parity error" in done.stdout


def test_a_file_that_changed_is_refused_on_a_pi_4(pi5, bundle):
    (bundle / "model.onnx").write_bytes(wrong_model())
    done = run("doctor", bundle, "--target", "arm64:pi4")
    assert done.exit_code == 6
    assert "model.onnx has" in done.stderr


def test_a_pi_4_has_no_dot_product_and_runs_the_bundle(pi5, finished_bundle):
    done = run("doctor", finished_bundle, "--target", "arm64:pi4", "--json")
    assert done.exit_code == 0, done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["processor"]["status"] == "warning"
    assert "Raspberry Pi 4" in found["system"]["found"]
    assert found["runtime"]["status"] == "good"  # imported by a process that another one started
    assert found["bundle"]["status"] == "good"


def test_accuracy_is_measured_where_images_are_given(pi5, finished_bundle, tmp_path):
    images = make_images(tmp_path / "images")
    options = ("--data", images, "--min-accuracy", "1", "--max-latency-ratio", "2", "--json")
    done = run("validate", finished_bundle, "--target", "arm64", *options)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["accuracy"]["value"] == 1
    assert found["latency ratio"]["status"] == "no data"  # never of an emulator's clock
    assert done.exit_code == 5


def test_a_pi_5_learns_what_this_machine_learns(pi5, learning_bundle, tmp_path):
    images = make_images(tmp_path / "images")
    words = ("adapt", learning_bundle, "--data", images, "--epochs", 2, "--val", images, "--json")
    here = run(*words, "--state", tmp_path / "here")
    there = run(*words, "--state", tmp_path / "there", "--target", "arm64")
    assert there.exit_code == 0, there.stderr
    own, other = json.loads(here.stdout), json.loads(there.stdout)
    assert other["best_epoch"] == own["best_epoch"]
    losses = [[line["train_loss"] or 0 for line in progress["history"]] for progress in (own, other)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert {path.name for path in (tmp_path / "there").iterdir()} >= {"state.safetensors"}


def test_instructions_are_the_same_again(pi5, finished_bundle, tmp_path):
    models = [("first", finished_bundle / "model.onnx"), ("second", finished_bundle / "model.onnx")]
    first, second = (count_instructions(pi5, models, seconds=120) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.fmla == other.fmla > 0
        assert one.total == pytest.approx(other.total, rel=0.01)
    assert first[1].ratio_to_first == pytest.approx(1, abs=0.1)


def test_on_an_arm_machine_nothing_is_emulated(pi5, finished_bundle):
    """The emulated Python is an ARM machine to what runs in it."""
    words = ("-m", "wasi_export", "validate", str(finished_bundle), "--target", "arm64", "--json")
    report = json.loads(output_of(pi5, words, seconds=200).stdout)
    assert {check["evidence"] for check in report["checks"]} == {"device"}
    assert "load" in {check["name"] for check in report["checks"]}  # all that `validate` does


def test_nothing_of_the_folder_here_is_imported_there(pi5, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    program = "import numpy, sys; print(sys.executable, numpy.__file__)"
    executable, numpy_file = output_of(pi5, ("-c", program), seconds=60).stdout.split()
    assert executable == str(pi5.python)
    assert Path(numpy_file).is_relative_to(pi5.environment["PYTHONPATH"].split(":")[0])
    assert executable != sys.executable
