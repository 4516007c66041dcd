"""The commands of a board run where torch, onnx and their like cannot be imported."""

import subprocess
import sys

import pytest
from helpers import make_bundle, make_images

ABSENT = ("torch", "torchvision", "timm", "accelerate", "onnx", "onnx_ir", "onnxscript", "sklearn", "tomli_w")


def run_without_training_packages(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process where importing any of `ABSENT` raises ImportError."""
    hide = f"import sys\nfor name in {ABSENT!r}:\n    sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, check=False)


@pytest.fixture
def paths(tmp_path):
    return {
        "bundle": str(make_bundle(tmp_path / "bundle", training=True)),
        "baseline": str(make_bundle(tmp_path / "baseline")),
        "data": str(make_images(tmp_path / "data")),
        "state": str(tmp_path / "state"),
        "report": str(tmp_path / "report"),
    }


@pytest.mark.parametrize(
    "command",
    [
        "validate {bundle} --baseline {baseline} --data {data} --min-accuracy 1 --rounds 2 --report {report}",
        "bench {bundle} {baseline} --rounds 2",
        "adapt {bundle} --data {data} --state {state} --epochs 2",
        "inspect {bundle}",
        "inspect {bundle} --json",
        "--help",
    ],
    ids=lambda command: command.split()[0],
)
def test_commands_of_a_board_need_no_training_packages(paths, command):
    arguments = command.format(**paths).split()
    done = run_without_training_packages(f"from wasi_export.cli import app\napp({arguments!r})")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout


@pytest.mark.parametrize("package", ABSENT)
def test_the_guard_fails_for_code_that_imports_a_training_package(package):
    done = run_without_training_packages(f"import {package}")
    assert done.returncode == 1
    assert f"import of {package} halted" in done.stderr


def test_the_guard_fails_for_our_own_training_code():
    done = run_without_training_packages("import wasi_export.subspace.linear")
    assert done.returncode == 1
    assert "import of torch halted" in done.stderr
