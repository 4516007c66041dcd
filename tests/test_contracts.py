"""The direction of imports: the contracts of pyproject.toml hold, and notice what breaks them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"

PLANTED = {
    "torch in the runtime": ("runtimes/session.py", "import torch", "the runtime is torch-free"),
    "onnx in the bundle": ("wasi_export/artifact.py", "import onnx", "the runtime is torch-free"),
    "training imports the converters": (
        "wasi_export/training/__init__.py", "import wasi_export.converters", "layers",
    ),
    "the method imports the training": (
        "wasi_export/subspace/__init__.py", "import wasi_export.training", "layers",
    ),
    "the errors import the command line": ("wasi_export/errors.py", "import wasi_export.cli", "layers"),
}  # fmt: skip


def lint_imports(folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", LINT_IMPORTS, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the packages and their contracts."""
    for name in ("wasi_export", "converters", "runtimes"):
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


def test_the_contracts_hold_in_an_unchanged_copy(sources: Path) -> None:
    assert lint_imports(sources).returncode == 0


@pytest.mark.parametrize(("file", "line", "contract"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_breaks_its_contract(sources: Path, file: str, line: str, contract: str) -> None:
    with (sources / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    done = lint_imports(sources)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout
