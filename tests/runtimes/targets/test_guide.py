"""The commands of the guides, in their order, on an emulated Raspberry Pi 5 as its user would type them."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import CLASSES, make_images
from PIL import Image

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "raspberry_pi.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


def blocks(page: str, language: str) -> list[str]:
    """Returns the fenced code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def shell(pi5, learning_bundle, tmp_path_factory):
    """Runs a script in the home of a board that has wasi-export, a bundle and photos."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    for name, words in (("python3", ""), ("wasi-export", "-m wasi_export ")):
        program = home / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{pi5.python}" {words}"$@"\n', encoding="utf-8")
        program.chmod(0o755)
    shutil.copytree(learning_bundle, home / "bundle")
    make_images(home / "photos")
    Image.new("RGB", (9, 7), (255, 255, 255)).save(home / "photo.jpg")
    environment = {**pi5.environment, "HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin"}

    def run(script: str) -> "subprocess.CompletedProcess[str]":
        words = ["bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(
            words, cwd=home, env=environment, capture_output=True, text=True, timeout=250, check=False
        )

    return run


def test_the_commands_of_the_guide_work_in_their_order(shell):
    scripts = blocks(GUIDE, "sh")
    assert len(scripts) == 3
    doctor, model, learning = (shell(script) for script in scripts)
    for done in (doctor, model, learning):
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Cortex-A76" in doctor.stdout
    assert "dot product for int8" in doctor.stdout
    assert "tiny: passed" in model.stdout
    assert learning.stdout.count("ended: ") == 2


def test_the_service_of_the_guide_starts_a_command_that_works(shell):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    (text,) = blocks(GUIDE, "ini")
    unit.read_string(text)
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program == "/home/pi/wasi/bin/wasi-export"
    hot = words.index("--max-celsius")
    assert "this machine tells no temperature" in shell(shlex.join(["wasi-export", *words])).stderr
    kept = [*words[:hot], *words[hot + 2 :], "--state", "of-the-service"]
    done = shell(shlex.join(["wasi-export", *kept]))
    assert done.returncode == 0, done.stderr


def test_the_program_of_the_readme_runs_on_a_pi_5(shell):
    (program,) = (block for block in blocks(README, "python") if "wasi_export" not in block)
    done = shell(shlex.join(["python3", "-c", program]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == CLASSES[1]
