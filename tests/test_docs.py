"""What the documents tell a user to type works, what they show is what comes, no link is broken.

Commands of ours are run in a folder that has what the pages speak of, made with a model of two small blocks.
NOT_RUN says which of them are only parsed, by the real command line with their configuration, and why.
"""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import (
    FENCE,
    GROUP,
    ROOT,
    Command,
    blocks,
    commands,
    mentioned_options,
    mentioned_scripts,
    options_of_command,
    understand,
)
from helpers import make_model
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner, Result

from wasi_export.cli import app
from wasi_export.cli._sweep import read_sweep
from wasi_export.config import AdaptConfig, Config, SubspaceConfig, Thresholds
from wasi_export.errors import ExitCode
from wasi_export.ranks import break_even_rank, round_rank
from wasi_export.settings import read_toml

pytestmark = pytest.mark.slow

NOT_RUN = {
    r" run( my\.toml| sweep\.toml -o \S+( --array \S+)?|)( -s .*)?$": "trains: tests/cli, .ci/run",
    r" --target ": "needs another machine: tests/runtimes/targets",
    r" --before ": "needs another machine: tests/runtimes/test_elsewhere.py",
    r" --checkpoint ": "a model of its real size: tests/cli/test_export.py",
    r" --profile": "trains longer: tests/training/test_profile.py",
}
"""Commands that are parsed only, by what they look like, each with the reason."""

SMALL = """
name = "photos"
[model]
name = "vit_tiny_patch16_224"
img_size = 16
kwargs = { embed_dim = 128, depth = 2, num_heads = 2, patch_size = 8 }
[data]
source = "photos"
batch_size = 8
[subspace]
calibration_images = 16
[train]
dense = { epochs = 1 }
subspace = { epochs = 1 }
[export]
golden_images = 4
"""
"""my.toml in the folder; those of the pages are loaded by a test of their own."""

COMMANDS = {str(command): command for command in commands() if command.page != "docs/reference/errors.md"}
OURS = [command for command in COMMANDS.values() if command.words[0] == "wasi-export"]
ERRORS = ROOT / "docs/reference/errors.md"


def reason_not_to_run(command: Command) -> str | None:
    """Returns why a command is parsed only."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, str(command))), None)


FIRST = (
    "wasi-export train my.toml",
    "wasi-export train my.toml --method subspace --init runs/photos/dense",
    "wasi-export export runs/photos/dense -o baseline",
    "wasi-export export runs/photos/subspace -o bundle --train-graph",
    "wasi-export validate bundle --data photos/val --baseline baseline --thresholds thresholds.toml "
    "--report report",
    "wasi-export adapt bundle --data new-photos --replay photos --state state",
    "wasi-export merge bundle state -o new-bundle",
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
    "openssl ec -in key.pem -pubout -out public.pem",
    "wasi-export sign bundle --key key.pem",
)
"""Commands of the pages that make the folder, in this order."""

COPIES = {
    "baseline": ["other-bundle", "runs/photos/baseline"],
    "bundle": ["runs/photos/bundle"],
    "new-bundle": ["learnt-bundle", "small", "together", "untrained"],
    "report": ["runs/photos/report"],
    "runs/photos": ["runs/digits"],
    "state": ["learnt", "state-1", "state-2"],
}
"""Folders that go by other names on some pages."""

RUN = [command for command in OURS if reason_not_to_run(command) is None and str(command) not in FIRST]


def call(*words: str) -> Result:
    return CliRunner().invoke(app, words, catch_exceptions=False)


def make_photos(folder: Path) -> None:
    """Writes eight pictures of each digit: four to train, two to judge, two that are new."""
    digits = load_digits()
    for digit in range(10):
        for index, image in enumerate(digits.images[digits.target == digit][:8]):
            part = "photos/train" if index < 4 else "photos/val" if index < 6 else "new-photos"
            path = folder / part / str(digit) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype(np.uint8)).convert("RGB").save(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who has done what the pages say before the command in question."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "my.toml").write_text(SMALL)
    (folder / "thresholds.toml").write_text("max_size_mb = 1")
    (folder / "sweep.toml").write_text(next(text for _, text in blocks("toml") if "[sweep]" in text))
    make_photos(folder)
    shutil.copy(folder / "photos/val/3/4.png", folder / "photo.jpg")  # Pillow goes by the content
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program, *words in map(shlex.split, FIRST):
            if program == "wasi-export":
                assert (done := call(*words)).exit_code == 0, done.output
            else:
                subprocess.run([program, *words], check=True, capture_output=True)
        for made, names in COPIES.items():
            for name in names:
                shutil.copytree(made, name)
        shutil.copy("runs/photos/dense/model.safetensors", "weights.safetensors")
        Path("from-the-future.onnx").write_bytes(make_model(ir_version=99))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(finished, tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("command", COMMANDS.values(), ids=str)
def test_a_command_is_understood_with_its_options_and_configuration(
    command: Command, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    understand(command.words)


@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_runs(command: Command, folder: Path) -> None:
    context = understand(command.words)
    for written in ("out", "state"):  # what the command writes is not there yet
        path = context.params.get(written)
        if path is not None and path.is_dir():
            shutil.rmtree(path)
    result = call(*command.words[1:])
    assert result.exit_code == 0, result.output
    if "--json" in command.words:
        json.loads(result.stdout)


def test_what_is_run_first_or_not_at_all_is_still_on_a_page() -> None:
    assert {*FIRST} <= COMMANDS.keys()
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, str(c)) for c in OURS)] == []


def test_the_commands_in_the_text_exist_with_their_options() -> None:
    mentioned = mentioned_options()
    assert len(mentioned) > 10
    assert [found for found in mentioned if not found[2] <= options_of_command(found[1])] == []


@pytest.mark.parametrize("line", sorted(mentioned_scripts()))
def test_a_benchmark_in_the_text_exists_with_its_options(line: str) -> None:
    understand(tuple(shlex.split(line)))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("wasi-export validate bundle --min-acuracy 0.9", "No such option: --min-acuracy"),
        ("wasi-export validat bundle", "validat"),
        ("wasi-export validate bundle --rounds many", "valid integer"),
        ("wasi-export run my.toml -s subspace.fracton=0.2", "unknown key 'subspace.fracton'"),
        ("torchrun --nproc-per-node 2 -m wasi_export train my.toml --oout x", "No such option: --oout"),
        ("python benchmarks/training.py --tain", "has no option"),
        ("pip install 'wasi-export[trian]'", "trian"),
        ("curl https://example.org", "nothing checks curl"),
    ],
)
def test_a_mistake_in_a_page_is_seen(
    words: str, complaint: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    with pytest.raises(Exception, match=complaint):
        understand(tuple(shlex.split(words)))


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_a_configuration_is_valid(page: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(SMALL)  # of which a sweep may be
    (path := tmp_path / "page.toml").write_text(text)
    if read_sweep(path, ()) is None:
        values = read_toml(path)
        (Thresholds if values.keys() <= Thresholds.model_fields.keys() else Config).model_validate(values)


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_a_program_runs(page: str, code: str, folder: Path) -> None:
    (folder / "program.py").write_text(code)
    with Image.open("photo.jpg") as image:  # what the pages leave to the reader
        runpy.run_path("program.py", {"images": [image.copy()] * 2, "labels": [0, 1]})


def error_examples() -> list[Any]:
    """Returns each example of the page of errors, with the exit code whose section it is in."""
    sections = re.split(r"^## (?=\d)", ERRORS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = [(int(s.split(":")[0]), example) for s in sections for _, example in FENCE.findall(s)]
    return [pytest.param(*pair, id=re.findall(r"^\$ (.*)", pair[1], re.MULTILINE)[-1]) for pair in found]


@pytest.mark.parametrize(("code", "example"), error_examples())
def test_an_error_reads_as_its_page_says(code: int, example: str, folder: Path, base_python: Any) -> None:
    typed = [line.removeprefix("$ ") for line in example.splitlines() if line.startswith("$ ")]
    *before, (_, *words) = map(shlex.split, typed)
    for line in typed[: len(before)]:
        subprocess.run(line, shell=True, check=True)
    if "pip install" in example:  # what the machine of the tests has all of
        done = base_python("-m", "wasi_export", *words, cwd=folder)
        found, output = done.returncode, done.stdout + done.stderr
    else:
        result = call(*words)
        found, output = result.exit_code, result.output
    assert found == code, output
    for line in example.splitlines()[len(typed) :]:
        assert re.search(re.escape(line).replace("…", ".*"), output), output


def test_the_page_of_errors_has_every_exit_code() -> None:
    sections = re.findall(r"^## (\d+): ", ERRORS.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(code) for code in sections] == list(ExitCode)
    assert {example.values[0] for example in error_examples()} == {1, 2, 3, 4, 5, 6}


def test_the_pictures_say_what_is_computed_and_what_was_measured() -> None:
    pictures = {
        path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs/concepts").glob("*.svg")
    }
    break_even = break_even_rank(1536, 384)
    assert f"break-even, K = {break_even:.0f}<" in pictures["break_even"]
    assert f"f = 0.4 asked: K = {round_rank(0.4 * break_even)}<" in pictures["break_even"]
    measured = re.findall(r"(\d\.\d\d) times", pictures["blocks"])
    assert len(measured) == 2
    page = (ROOT / "docs/inference.md").read_text(encoding="utf-8")
    assert re.search(rf"192→768: {measured[0]} at K = 32, {measured[1]}\s+at 40", page)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning: a link that leads nowhere is one."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "docs/site/mkdocs.yml"), "-d", str(folder)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_asks_nothing_of_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'src="https?:[^"]*|<link [^>]*href="https?:[^"]*', text) == []


def test_the_reference_has_every_command_and_key(site: Path) -> None:
    commands_page = (site / "reference/commands.html").read_text(encoding="utf-8")
    assert [name for name in GROUP.commands if f'id="wasi-export-{name}"' not in commands_page] == []
    keys = (site / "reference/configuration.html").read_text(encoding="utf-8")
    assert "<code>[train.subspace.memory]</code>" in keys
    for model in (SubspaceConfig, AdaptConfig, Thresholds):
        assert [name for name in model.model_fields if f"<code>{name}</code>" not in keys] == []
