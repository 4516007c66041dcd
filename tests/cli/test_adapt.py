import json
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import CLASSES, make_images
from PIL import Image
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.runtimes.state_folder import read_state

COMMAND = [sys.executable, "-m", "wasi_export", "adapt"]


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for label, level in (("dark", 200), ("light", 50)):  # the other way round than the bundle knows it
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(20):
            grey = int(level + generator.integers(-40, 40))
            Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / "data" / label / f"{index}.png")
    return tmp_path / "data"


def arguments(bundle, data, state, *more):
    return [str(bundle), "--data", str(data), "--state", str(state), "--lr", "0.05", *map(str, more)]


def run(bundle, data, state, *more):
    return CliRunner().invoke(app, ["adapt", *arguments(bundle, data, state, *more)])


def test_a_table_says_what_was_learnt_and_where_it_is(learning_bundle, data, tmp_path):
    done = run(learning_bundle, data, tmp_path / "state", "--epochs", 3)
    assert done.exit_code == 0, done.output
    assert "32 new images" in done.stdout
    assert "(kept)" in done.stdout
    assert f"state: {tmp_path / 'state'}" in done.stdout


def test_json_has_every_epoch(learning_bundle, data, tmp_path):
    done = run(learning_bundle, data, tmp_path / "state", "--epochs", 3, "--json")
    progress = json.loads(done.stdout)
    assert [line["epoch"] for line in progress["history"]] == [0, 1, 2, 3]
    assert progress["ended"] == "epochs"
    assert progress["step"] == 3 * 8


def test_a_finished_training_is_told_again_and_not_done_again(learning_bundle, data, tmp_path):
    first = run(learning_bundle, data, tmp_path / "state", "--epochs", 2, "--json")
    written = (tmp_path / "state" / "state.safetensors").stat().st_mtime_ns
    again = run(learning_bundle, data, tmp_path / "state", "--epochs", 2, "--json")
    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert (tmp_path / "state" / "state.safetensors").stat().st_mtime_ns == written


def test_images_come_from_an_archive_too(learning_bundle, tmp_path):
    pixels = np.zeros((8, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "new.npz", images=pixels, labels=np.arange(8) % 2)
    done = run(learning_bundle, tmp_path / "new.npz", tmp_path / "state", "--epochs", 1)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.float32), "labels": [0, 1]}, r"uint8 \[N, H, W\]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0]}, r"integers \[2\]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 2]}, "from 0 to 2, the model has 2 classes"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "`images` and `labels`"),
    ],
)
def test_an_archive_of_something_else_is_refused(learning_bundle, tmp_path, arrays, message):
    np.savez(tmp_path / "new.npz", **arrays)
    done = run(learning_bundle, tmp_path / "new.npz", tmp_path / "state")
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr


def test_a_class_that_the_model_does_not_know_is_refused(learning_bundle, tmp_path):
    make_images(tmp_path / "data")
    (tmp_path / "data" / CLASSES[0]).rename(tmp_path / "data" / "grey")
    done = run(learning_bundle, tmp_path / "data", tmp_path / "state")
    assert done.exit_code == 2
    assert "class folders grey that the model does not know" in done.stderr


def test_a_bundle_without_a_training_step_is_refused(finished_bundle, data, tmp_path):
    done = run(finished_bundle, data, tmp_path / "state")
    assert done.exit_code == 2
    assert "export it again with --train-graph" in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(learning_bundle, data, tmp_path, number):
    options = ("--epochs", "4000", "--patience", "100000", "--commit-every", "100000")
    process = subprocess.Popen(
        [*COMMAND, *arguments(learning_bundle, data, tmp_path / "state", *options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(tmp_path / "state" / "best.safetensors")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes" in errors


@pytest.mark.slow
def test_kills_at_random_moments_lose_no_committed_step(learning_bundle, data, tmp_path):
    options = ("--epochs", "40", "--patience", "1000", "--commit-every", "3")
    whole = run(learning_bundle, data, tmp_path / "whole", *options)
    assert whole.exit_code == 0
    state, kills, delays = tmp_path / "state", 0, random.Random(0)
    command = [*COMMAND, *arguments(learning_bundle, data, state, *options)]
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            process.wait(timeout=delays.uniform(0.3, 1.4))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, process.stderr.read()
        process.stderr.close()
        break
    assert kills >= 1
    ours, theirs = read_state(state), read_state(tmp_path / "whole")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)
