"""Node for the scripts of this folder; a test is skipped where it or a package of it is not installed."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
PACKAGES = FOLDER / "node_modules"
CHROMIUM = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")

RunNode = Callable[..., Any]


@pytest.fixture(scope="session")
def node() -> RunNode:
    """Runs a script on arguments and text for its stdin; returns what it prints, read as JSON."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed")

    def run(script: str, *arguments: object, stdin: str = "") -> Any:
        command = [program, str(FOLDER / script), *map(str, arguments)]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def onnxruntime_web(node: RunNode) -> RunNode:
    """The same, where the scripts find onnxruntime-web."""
    require("onnxruntime-web")
    return node


@pytest.fixture(scope="session")
def chromium(node: RunNode) -> RunNode:
    """Runs a script that opens pages in a headless Chromium."""
    require("playwright-core")
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is installed")
    return lambda script, *arguments: node(script, program, *arguments)


@pytest.fixture(scope="session")
def open_page(onnxruntime_web: RunNode, chromium: RunNode) -> RunNode:
    """Opens a URL in a headless Chromium, and picks a bundle and an image there."""
    return lambda *arguments: chromium("open_page.mjs", *arguments)


def require(package: str) -> None:
    """Skips the test where a package is not installed."""
    if not (PACKAGES / package).is_dir():
        pytest.skip(f"{package} is not installed: npm ci --prefix tests/web")
