"""The recipe for the CI of a user, and the action that calls it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from helpers import make_bundle

from wasi_export.errors import worst

CI = Path(__file__).parents[1] / ".ci"


@pytest.fixture
def wasi_export_that_only_validates_here(tmp_path):
    """A PATH on which `wasi-export` is this one, but refuses targets: they have tests of their own."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "wasi-export"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *--target*) exit 3;; esac\nexec "{sys.executable}" -m wasi_export "$@"\n'
    )
    program.chmod(0o755)
    return f"{tmp_path}/bin:{os.defpath}"


def run_recipe(path, summary, *arguments):
    environment = {"PATH": path, "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    return subprocess.run(
        [CI / "validate-bundle", *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def test_the_recipe_writes_reports_and_ends_with_the_code_of_what_failed(
    wasi_export_that_only_validates_here, finished_bundle, tmp_path
):
    summary = tmp_path / "summary"
    done = run_recipe(wasi_export_that_only_validates_here, summary, finished_bundle, tmp_path / "my report")
    assert done.returncode == 3, done.stderr  # of the target
    report = tmp_path / "my report" / "here"
    assert ET.parse(report / "report.junit.xml").getroot().tag == "testsuites"
    assert summary.read_text(encoding="utf-8") == (report / "report.md").read_text(encoding="utf-8")


def test_a_check_that_failed_here_is_told_also_where_no_arm_can_be_emulated(
    wasi_export_that_only_validates_here, tmp_path
):
    bundle = make_bundle(tmp_path / "bundle", golden_error=0.1)
    path = wasi_export_that_only_validates_here
    done = run_recipe(path, tmp_path / "summary", bundle, tmp_path / "report")
    assert done.returncode == 1
    assert "failed: parity error" in done.stdout
    assert "::error title=tiny%3A parity error::failed: 0.09" in done.stdout


@pytest.mark.parametrize(
    ("here", "there"),
    [(0, 0), (0, 3), (1, 0), (1, 3), (5, 1), (1, 5), (5, 3), (3, 5), (1, 6), (2, 130), (6, 70), (137, 1)],
)
def test_the_recipe_ends_with_the_worst_exit_code(tmp_path, here, there):
    program = tmp_path / "wasi-export"
    program.write_text(f'#!/bin/sh\ncase "$*" in *--target*) exit {there};; esac\nexit {here}\n')
    program.chmod(0o755)
    done = run_recipe(f"{tmp_path}:{os.defpath}", tmp_path / "summary", "bundle", "report")
    assert done.returncode == worst([here, there]), done.stderr


def test_the_action_calls_the_recipe_and_takes_no_input_for_code():
    text = (CI / "action.yml").read_text(encoding="utf-8")
    scripts = re.findall(r"run: (?:\|\n((?: {8}.*\n)+)|(.*)\n)", text)
    assert any("validate-bundle" in script for script, _ in scripts)
    assert not any("${{" in script for pair in scripts for script in pair)
    declared = set(re.findall(r"^  (\w+):$", text, re.MULTILINE)) - {"steps"}
    assert set(re.findall(r"inputs\.(\w+)", text)) == declared
