import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import require_schema
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.cli._config import DEMO, read_config
from wasi_export.config import Config

TINY = """
name = "tiny"
[model]
name = "vit_tiny_patch16_224"
img_size = 16
in_chans = 1
kwargs = { embed_dim = 64, depth = 2, num_heads = 2, patch_size = 4 }
[data]
source = "digits"
train_images = 64
val_images = 20
batch_size = 16
[train.dense]
epochs = 1
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def error_of(result) -> str:
    """Returns the one line on stderr."""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("override", "code", "line"),
    [
        ("train.dense.epoch=3", 2, "unknown key 'train.dense.epoch', did you mean 'epochs'?"),
        ("subspace.rank=0", 2, "subspace.rank: Input should be greater than or equal to 1, got 0"),
        ("subspace.epsilon=1.7", 2, "subspace.epsilon: Input should be less than or equal to 1, got 1.7"),
        ("train.dense.lr", 2, "an override reads section.key=value, got 'train.dense.lr'"),
        ("data.source=nowhere", 2, "no data source 'nowhere': give `digits`, `fashion-mnist`, or a folder"),
        ("model.name=vit_tinny_patch16_224", 2, "did you mean vit_tiny_patch16_224"),
        ("model.kwargs.dept=1", 2, "timm cannot make vit_tiny_patch16_224"),
        ("model.checkpoint=nowhere.pth", 2, "no checkpoint nowhere.pth"),
        ("train.dense.opt=adamx", 2, "has no optimizer 'adamx'"),
        ("train.dense.sched=linear", 2, "sched must be one of cosine,"),
    ],
)
def test_a_wrong_value_is_one_line_and_an_exit_code(config, tmp_path, override, code, line):
    result = train(config, "-o", tmp_path / "run", "-s", override)
    assert result.exit_code == code
    assert line in error_of(result)


def test_an_empty_folder_of_images_is_nothing_to_check(config, tmp_path):
    (tmp_path / "images").mkdir()
    result = train(config, "-o", tmp_path / "run", "-s", f"data.source={tmp_path / 'images'}")
    assert result.exit_code == 5
    assert f"no images in {tmp_path / 'images'}" in error_of(result)


def test_a_file_that_is_not_an_image_is_named(config, tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not an image")
    result = train(config, "-o", tmp_path / "run", "-s", f"data.source={tmp_path / 'images'}")
    assert result.exit_code == 2
    assert "3 of 3 images in" in error_of(result)
    assert "cat/1.png (no image)" in error_of(result)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "no configuration file"),
        ("name = ", "is not TOML"),
        ("[modl]\nname = 'x'", "did you mean 'model'"),
    ],
)
def test_a_wrong_configuration_file_is_one_line(tmp_path, content, line):
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_text(content)
    result = train(path)
    assert result.exit_code == 2
    assert line in error_of(result)


def test_a_start_that_is_no_run_is_an_integrity_error(config, tmp_path):
    result = train(config, "--init", tmp_path, "--method", "subspace", "-o", tmp_path / "run")
    assert result.exit_code == 6
    assert f"{tmp_path} holds no finished run" in error_of(result)


def test_an_error_is_an_object_with_json(config, tmp_path):
    result = train(config, "-o", tmp_path / "run", "-s", "model.name=nonsense", "--json")
    assert json.loads(result.stdout)["error"]["type"] == "ConfigError"
    assert json.loads(result.stdout)["error"]["exit_code"] == result.exit_code == 2


def test_the_built_in_configuration_is_used_without_a_file():
    assert read_config(None, None) == Config.from_toml(DEMO)


def test_the_built_in_configuration_shows_every_section():
    demo = tomllib.loads(DEMO.read_text())
    assert demo.keys() == Config.model_fields.keys()
    assert demo["train"].keys() == {"dense", "subspace"}


@pytest.mark.slow
def test_a_run_is_trained_and_then_found_finished(config, tmp_path):
    first = train(config, "-o", tmp_path / "run", "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout) == json.loads((tmp_path / "run" / "run.json").read_text())
    require_schema("run", first.stdout)
    require_schema("epoch", (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert first.stderr.startswith("epoch 1: loss ")
    again = train(config, "-o", tmp_path / "run")
    assert again.exit_code == 0
    assert "was finished already" in again.stderr
    assert "val_accuracy" in again.stdout


def test_a_trace_is_part_of_a_profile(config, tmp_path):
    result = train(config, "-o", tmp_path / "run", "--trace", "trace.json")
    assert result.exit_code == 2
    assert error_of(result) == "error: --trace trace.json needs --profile"


@pytest.mark.slow
def test_a_profile_is_printed_as_tables_and_as_json(config, tmp_path):
    options = ("-s", "data.batch_size=4", "--profile")
    result = train(config, "-o", tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    for name in ("data", "forward", "backward", "clipping", "update", "whole step", "attention", "norm"):
        assert f" {name} " in result.stdout
    result = train(config, "-o", tmp_path / "run", *options, "--force", "--json")
    require_schema("profiled-run", result.stdout)
    require_schema("profile", (tmp_path / "run" / "profile.json").read_bytes())
    printed = json.loads(result.stdout)
    assert printed["profile"] == json.loads((tmp_path / "run" / "profile.json").read_text())
    assert printed["run"] == json.loads((tmp_path / "run" / "run.json").read_text())


@pytest.mark.slow
def test_too_few_steps_to_profile_are_one_line_and_the_run_is_kept(config, tmp_path):
    result = train(config, "-o", tmp_path / "run", "--profile")
    assert result.exit_code == 2
    assert "a profile needs 12 training steps or more, this took 4" in result.stderr.splitlines()[-1]
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_a_signal_to_the_process_group_saves_and_the_same_command_resumes(config, tmp_path, number, workers):
    """What Ctrl-C in a terminal does: the signal goes to the loader's workers too, at any moment."""
    options = ("-s", "train.dense.epochs=8", "-s", f"data.workers={workers}")
    command = [sys.executable, "-m", "wasi_export", "train", str(config), *options, "-o"]
    process = subprocess.Popen(
        [*command, tmp_path / "run"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr.readline().startswith("epoch 1: ")
    assert process.stderr.readline().startswith("epoch 2: ")
    os.killpg(process.pid, number)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130
    assert lines[-1].startswith("error: interrupted at epoch ")
    assert lines[-1].endswith(
        f"saved {tmp_path / 'run' / 'checkpoint.safetensors'}, the same command resumes"
    )

    for folder in ("run", "uninterrupted"):
        assert train(config, *options, "-o", tmp_path / folder).exit_code == 0
    weights = (
        Path(tmp_path, folder, "model.safetensors").read_bytes() for folder in ("run", "uninterrupted")
    )
    assert next(weights) == next(weights)
    interrupted, whole = (
        [
            {
                key: value
                for key, value in json.loads(line).items()
                if "seconds" not in key and "second" not in key
            }
            for line in Path(tmp_path, folder, "metrics.jsonl").read_text().splitlines()
        ]
        for folder in ("run", "uninterrupted")
    )
    assert interrupted == whole
