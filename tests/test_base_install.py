"""A board gets `pip install wasi-export` and nothing more: every command it needs must work with that."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from helpers import make_bundle, make_images

RunPython = Callable[..., CompletedProcess[str]]

NOT_INSTALLED = ("torch", "timm", "onnx", "onnx_ir", "onnxscript", "sklearn", "matplotlib", "pytest")


@pytest.mark.parametrize("module", NOT_INSTALLED)
def test_the_base_install_lacks_what_trains_and_exports(base_python: RunPython, module: str) -> None:
    assert f"No module named '{module}'" in base_python("-c", f"import {module}").stderr


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "inspect {bundle}",
        "bench {bundle} {bundle}/model.onnx --rounds 2",
        "validate {bundle} --baseline {bundle} --data {images} --min-accuracy 1 --rounds 2 --report {report}",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_command_of_the_board_works_with_the_base_install(
    base_python: RunPython, tmp_path: Path, command: str
) -> None:
    bundle, images = make_bundle(tmp_path / "bundle"), make_images(tmp_path / "images")
    arguments = command.format(bundle=bundle, images=images, report=tmp_path / "report").split()
    done = base_python("-m", "wasi_export", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_changed_bundle_is_refused_with_one_line_and_its_exit_code(
    base_python: RunPython, bundle: Path
) -> None:
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:-1])
    done = base_python("-m", "wasi_export", "validate", str(bundle))
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("error: bundle ")
    assert done.stderr.count("\n") == 1


def test_what_needs_an_extra_names_it(base_python: RunPython) -> None:
    code = "from wasi_export.datasets import load_splits; load_splits('digits')"
    assert "pip install 'wasi-export[train]'" in base_python("-c", code).stderr
