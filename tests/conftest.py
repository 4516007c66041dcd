"""What several test modules need: a generator, the small bundle, and a Python with only the base install."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from helpers import make_bundle
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# Of the processes of `pytest -n` and of what they start, each has its share of the processors.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# The same examples on every run, and no failure because another process had the processor. `thorough` is for
# once in a while: HYPOTHESIS_PROFILE=thorough, or pytest --hypothesis-profile=thorough.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.register_profile(
    "thorough", max_examples=1000, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def finished_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle, to be read only."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def learning_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle with a training step, to be read only."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "learning", training=True)


@pytest.fixture
def bundle(finished_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle that a test may break."""
    return Path(shutil.copytree(finished_bundle, tmp_path / "bundle"))


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> RunPython:
    """Runs Python where nothing but the declared base install and all it requires can be imported.

    A folder of links to the installed files stands for a fresh environment: it needs no network, and a base
    dependency that pyproject.toml forgot is missing in it.
    """
    packages = tmp_path_factory.mktemp("base-install")
    for name in base_install():
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top != ".." and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    if not (packages / "wasi_export").exists():  # an editable install lists no packages
        (packages / "wasi_export").symlink_to(ROOT / "wasi_export")
    environment = {"PYTHONPATH": str(packages), "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-S", *arguments]  # -S: without the packages of this environment
        return subprocess.run(
            command, env=environment, cwd=cwd or packages, capture_output=True, text=True, timeout=120
        )

    return run


def base_install() -> set[str]:
    """Returns the names of the distributions that `pip install wasi-export` brings here."""
    names: set[str] = set()
    waiting = ["wasi-export"]
    while waiting:
        name = waiting.pop()
        if name in names:
            continue
        names.add(name)
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return names
