import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import CLASSES, TRAINING, factors, make_images, make_manifest, require_schema
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.cli import app
from wasi_export.datasets import load_new_images
from wasi_export.interrupt import TrainingInterrupted
from wasi_export.manifest import PARAMETERS, STEP
from wasi_export.runtimes.adapt import AdaptOptions, adapt, adapt_images
from wasi_export.runtimes.adapter import Adapter
from wasi_export.runtimes.budget import celsius
from wasi_export.runtimes.energy import POWERCAP
from wasi_export.runtimes.schedule import learning_rate
from wasi_export.runtimes.state_folder import PREVIOUS, STATE

LR = 0.05
ENDLESS = ("--epochs", 10**6, "--batch-size", 1)  # no machine comes to its end before the test does
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
    return [str(bundle), "--data", str(data), "--state", str(state), "--lr", str(LR), *map(str, more)]


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
    require_schema("adapt", done.stdout)
    progress = json.loads(done.stdout)
    assert [line["epoch"] for line in progress["history"]] == [0, 1, 2, 3]
    assert progress["ended"] == "epochs"
    assert progress["step"] == 3 * 8


def test_the_base_install_is_enough(base_python, learning_bundle, data, tmp_path):
    state = tmp_path / "state"
    done = base_python("-m", "wasi_export", "adapt", *arguments(learning_bundle, data, state, "--epochs", 1))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"state: {state}" in done.stdout


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
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": [0, 1]}, r"got uint8 \[2, 3, 4, 4\]"),
        ({"images": np.zeros((2, 0, 4), np.uint8), "labels": [0, 1]}, "no pixels"),
        ({"images": np.array([{}], object), "labels": [0]}, "Object arrays cannot be loaded"),
    ],
)
def test_an_archive_of_something_else_is_refused(learning_bundle, tmp_path, arrays, message):
    np.savez(tmp_path / "new.npz", **arrays)
    done = run(learning_bundle, tmp_path / "new.npz", tmp_path / "state")
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize("bytes_kept", [0, 100, -5, None], ids=["empty", "cut", "without its end", "changed"])
def test_a_damaged_archive_is_refused(learning_bundle, tmp_path, bytes_kept):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 4, 4)).astype(np.uint8)
    path = tmp_path / "new.npz"
    np.savez_compressed(path, images=pixels, labels=np.arange(20) % 2)
    good = path.read_bytes()
    path.write_bytes(good[:bytes_kept] if bytes_kept is not None else good[:60] + b"damaged!" + good[68:])
    refused(run(learning_bundle, path, tmp_path / "state"), 2, r"new.npz is not an .npz of .* numpy.savez")


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


def refused(done, code, message):
    """Asserts one line on stderr that says this, and the exit code."""
    assert done.exit_code == code, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_images_that_are_not_there_are_refused(learning_bundle, data, tmp_path):
    state, missing, empty = tmp_path / "state", tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    refused(run(learning_bundle, missing, state), 2, "no data source '.*missing': give")
    refused(run(learning_bundle, data, state, "--replay", missing), 2, "no data source '.*missing': give")
    refused(run(learning_bundle, data, state, "--val", missing), 2, "no data source '.*missing': give")
    refused(run(learning_bundle, tmp_path / "no.npz", state), 2, "no.npz is not .* No such file")
    refused(run(learning_bundle, empty, state), 5, "no images in .*empty: expected .*<class>")
    (empty / "dark").mkdir()
    refused(run(learning_bundle, empty, state), 5, "no images in .*empty: expected .*<class>")
    Image.new("RGB", (8, 8)).save(empty / "dark" / "one.png")
    refused(run(learning_bundle, empty, state), 2, "1 image cannot be split .* add images")
    assert not state.exists()


@pytest.mark.parametrize("damage", ["noise", "cut", "empty"])
def test_an_image_that_cannot_be_read_is_left_out_and_named(learning_bundle, data, tmp_path, caplog, damage):
    path = data / "dark" / "7.png"
    content = {"noise": b"noise" * 50, "cut": path.read_bytes()[:50], "empty": b""}[damage]
    path.write_bytes(content)
    done = run(learning_bundle, data, tmp_path / "state", "--json")
    assert (done.exit_code, json.loads(done.stdout)["unreadable_images"]) == (0, 1)
    (warning,) = caplog.messages
    assert re.fullmatch(r"1 of 40 images in .* cannot be read: dark/7\.png \(.*\); left out", warning)
    path.unlink()
    run(learning_bundle, data, tmp_path / "without")
    ours, without = (load_file(tmp_path / name / STATE) for name in ("state", "without"))
    assert all(np.array_equal(ours[name], without[name]) for name in ours)


@pytest.mark.parametrize("lr", ["0", "-1", "nan", "inf"])
def test_a_learning_rate_that_is_none_is_refused(learning_bundle, data, tmp_path, lr):
    refused(run(learning_bundle, data, tmp_path / "state", "--lr", lr), 2, f"--lr must be above 0, got {lr}")


def test_a_bundle_whose_loss_takes_no_labels_is_refused(learning_bundle, data, tmp_path):
    bundle = shutil.copytree(learning_bundle, tmp_path / "bundle")
    settings = TRAINING.settings.model_copy(update={"loss": "soft_targets"})
    training = TRAINING.model_copy(update={"settings": settings})
    write_bundle_manifest(bundle, make_manifest().model_copy(update={"training": training}))
    refused(run(bundle, data, tmp_path / "state"), 2, "adapt.loss = 'soft_targets', .* no labels: .* Python")


def test_the_augmentation_is_that_of_the_export(learning_bundle, data, tmp_path):
    keys = set()
    for hflip in (0.0, 1.0):
        bundle = shutil.copytree(learning_bundle, tmp_path / f"bundle {hflip}")
        settings = TRAINING.settings.model_copy(update={"hflip": hflip, "scale": (0.9, 1.0)})
        training = TRAINING.model_copy(update={"settings": settings})
        write_bundle_manifest(bundle, make_manifest().model_copy(update={"training": training}))
        done = run(bundle, data, tmp_path / f"state {hflip}", "--epochs", 1, "--json")
        keys.add(json.loads(done.stdout)["key"])
    assert len(keys) == 2  # a state of one augmentation is not gone on with in another


def test_a_changed_bundle_is_refused(learning_bundle, data, tmp_path):
    bundle = shutil.copytree(learning_bundle, tmp_path / "bundle")
    (bundle / STEP).write_bytes((bundle / STEP).read_bytes()[:-1])
    refused(run(bundle, data, tmp_path / "state"), 6, "train/step.onnx has .* bytes, the manifest says")


def test_a_state_of_another_bundle_other_images_or_other_options_is_not_gone_on_with(
    learning_bundle, data, tmp_path
):
    state = tmp_path / "state"
    assert run(learning_bundle, data, state, "--epochs", 1).exit_code == 0
    refused(run(learning_bundle, data, state, "--epochs", 2), 2, "other images or options .* new --state")
    other = shutil.copytree(learning_bundle, tmp_path / "other")
    save_file({name: 2 * value for name, value in factors().items()}, other / PARAMETERS)
    write_bundle_manifest(other, Bundle.open(learning_bundle).manifest)
    refused(run(other, data, state, "--epochs", 1), 2, "of another bundle .* new folder")
    (data / "dark" / "0.png").unlink()
    refused(run(learning_bundle, data, state, "--epochs", 1), 2, "other images or options .* new --state")


def test_a_state_that_is_damaged_is_refused_where_the_commit_before_is_too(learning_bundle, data, tmp_path):
    state = tmp_path / "state"
    first = run(learning_bundle, data, state, "--epochs", 2, "--json")
    (state / STATE).write_bytes(b"")
    again = run(learning_bundle, data, state, "--epochs", 2, "--json")
    learnt = [
        {k: v for k, v in line.items() if k != "seconds"} for line in json.loads(first.stdout)["history"]
    ]
    assert learnt == [
        {k: v for k, v in e.items() if k != "seconds"} for e in json.loads(again.stdout)["history"]
    ]
    for name in (STATE, PREVIOUS):
        (state / name).write_bytes(b"")
    refused(run(learning_bundle, data, state, "--epochs", 2), 6, "holds no whole state .*: name a new folder")


def test_a_state_folder_that_cannot_be_written_is_refused(learning_bundle, data, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(learning_bundle, data, tmp_path / "file"), 2, "cannot write .*file: .* choose another place")
    refused(run(learning_bundle, data, "/proc/state"), 2, "cannot write /proc/state: .* choose another place")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_state_folder_is_refused(learning_bundle, data, tmp_path):
    (tmp_path / "state").mkdir(mode=0o555)
    refused(
        run(learning_bundle, data, tmp_path / "state"), 2, "cannot write .*state: .* choose another place"
    )


def test_an_error_is_json_where_that_is_asked_for(learning_bundle, data, tmp_path):
    done = run(learning_bundle, tmp_path / "missing", tmp_path / "state", "--json")
    assert json.loads(done.stdout)["error"]["exit_code"] == done.exit_code == 2


@pytest.mark.parametrize("option", [("--replay-share", 0.5), ("--replay-limit", 4)])
def test_an_option_of_replay_is_refused_without_it(learning_bundle, data, tmp_path, option):
    refused(
        run(learning_bundle, data, tmp_path / "state", *option),
        2,
        f"{option[0]}={option[1]} needs --replay: give it too, or leave out what needs it",
    )
    assert not (tmp_path / "state").exists()


def test_old_images_are_replayed_and_own_ones_are_judged(learning_bundle, data, tmp_path):
    make_images(tmp_path / "old")
    done = run(learning_bundle, data, tmp_path / "a", "--epochs", 1, "--replay", tmp_path / "old")
    assert "32 new images, 3 to replay" in done.stdout  # a fifth of both is held out
    val = ("--replay", tmp_path / "old", "--val", tmp_path / "old", "--replay-share", 0.5, "--json")
    done = run(learning_bundle, data, tmp_path / "b", "--epochs", 1, *val)
    progress = json.loads(done.stdout)
    assert progress["step"] == (40 + 40) / TRAINING.settings.batch_size
    assert progress["history"][0]["accuracy"] == 1.0  # the bundle knows the old ones


def test_images_to_judge_on_come_from_an_archive_too(learning_bundle, data, tmp_path):
    np.savez(tmp_path / "val.npz", images=np.zeros((3, 4, 4), np.uint8), labels=[0, 1, 1])
    done = run(
        learning_bundle, data, tmp_path / "state", "--epochs", 1, "--val", tmp_path / "val.npz", "--json"
    )
    assert json.loads(done.stdout)["history"][0]["accuracy"] == pytest.approx(1 / 3)


def test_a_folder_with_a_part_for_training_is_read_without_the_other(learning_bundle, data, tmp_path):
    make_images(tmp_path / "photos" / "val")
    data.rename(tmp_path / "photos" / "train")
    done = run(learning_bundle, tmp_path / "photos", tmp_path / "state", "--epochs", 1)
    assert "32 new images" in done.stdout


def test_a_training_that_gets_no_better_ends_early_with_what_was_best(learning_bundle, data, tmp_path):
    make_images(tmp_path / "known")  # which the images to learn contradict
    state = tmp_path / "state"
    options = ("--epochs", 50, "--patience", 2, "--val", tmp_path / "known", "--lr", 0.5)
    done = run(learning_bundle, data, state, *options, "--sched", "constant", "--json")
    progress = json.loads(done.stdout)
    assert progress["ended"] == "patience"
    assert progress["epoch"] == progress["improved_epoch"] + 2
    assert progress["history"][-1]["accuracy"] < progress["best_accuracy"] == 1.0
    kept = load_file(state / STATE)
    if progress["best_epoch"] == 0:
        assert all(np.array_equal(kept[name], value) for name, value in factors().items())


@pytest.mark.parametrize("sched", ["cosine", "constant"])
def test_the_learning_rate_is_that_of_the_schedule_at_the_end_of_each_epoch(
    learning_bundle, data, tmp_path, sched
):
    done = run(learning_bundle, data, tmp_path / "state", "--epochs", 3, "--sched", sched, "--json")
    warmup = TRAINING.settings.warmup_steps
    for line in json.loads(done.stdout)["history"]:
        expected = learning_rate(sched, line["steps"], lr=LR, steps=3 * 8, warmup=warmup)
        assert line["lr"] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_loss_that_is_never_finite_ends_with_what_to_do(learning_bundle, data, tmp_path):
    done = run(learning_bundle, data, tmp_path / "state", "--lr", "1e38")
    refused(done, 4, r"the loss is .* after 5 returns to lower rates: lower --lr \(now 1e\+38\)")
    assert all(np.isfinite(tensor).all() for tensor in load_file(tmp_path / "state" / STATE).values())


def test_a_training_in_parts_ends_as_one_in_one_piece(learning_bundle, data, tmp_path):
    run(learning_bundle, data, tmp_path / "whole", "--epochs", 2)
    calls = 1
    while (
        "the same command goes on"
        in (done := run(learning_bundle, data, tmp_path / "parts", "--epochs", 2, "--max-seconds", 0)).stdout
    ):
        assert done.exit_code == 0
        calls += 1
    assert calls > 2 * 8
    whole, parts = (load_file(tmp_path / name / STATE) for name in ("whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_images_that_are_away_for_a_while_cost_no_step(learning_bundle, data, tmp_path):
    run(learning_bundle, data, tmp_path / "whole", "--epochs", 2)
    run(learning_bundle, data, tmp_path / "state", "--epochs", 2, "--max-seconds", 0)
    before = {path: path.read_bytes() for path in data.rglob("*.png")}
    for path, content in before.items():
        path.write_bytes(b"?" * len(content))
    refused(run(learning_bundle, data, tmp_path / "state", "--epochs", 2), 2, "40 of 40 images .* something")
    assert committed_step(tmp_path / "state") == 1
    for path, content in before.items():
        path.write_bytes(content)
    run(learning_bundle, data, tmp_path / "state", "--epochs", 2)
    whole, parts = (load_file(tmp_path / name / STATE) for name in ("whole", "state"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_too_much_memory_ends_with_the_step_saved(learning_bundle, data, tmp_path):
    refused(
        run(learning_bundle, data, tmp_path / "state", "--max-rss-mb", 1),
        3,
        "MB, --max-rss-mb allows 1: .* saved",
    )
    assert committed_step(tmp_path / "state") == 1


@pytest.mark.skipif(celsius() is not None, reason="this machine has sensors")
def test_a_limit_of_heat_is_refused_where_nothing_measures_it(learning_bundle, data, tmp_path):
    done = run(learning_bundle, data, tmp_path / "state", "--max-celsius", 70)
    refused(done, 3, "tells no temperature, --max-celsius 70 cannot be kept: leave it out")


@pytest.mark.skipif(any(POWERCAP.glob("intel-rapl:*")), reason="this machine has a meter")
def test_a_limit_of_energy_is_refused_where_nothing_measures_it(learning_bundle, data, tmp_path):
    done = run(learning_bundle, data, tmp_path / "state", "--max-joules", 70)
    refused(done, 3, "no energy meter .* --max-joules cannot be kept: leave it out")


def test_progress_is_shown_on_a_terminal(learning_bundle, data, tmp_path):
    terminal, stderr = pty.openpty()
    command = [*COMMAND, *arguments(learning_bundle, data, tmp_path / "state", "--epochs", 2)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stderr, check=True)
    os.close(stderr)
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(terminal, "rb", 0) as reader:  # EIO: all is read
        while part := reader.read(1024):
            shown += part
    for text in (b"evaluate", b"epoch 1/2", b"epoch 2/2", b"0/8"):
        assert text in shown


def test_the_process_lets_others_go_first_where_that_is_asked_for(learning_bundle, data, tmp_path):
    options = ("--nice", 7, "--threads", 2, *ENDLESS)
    with running(learning_bundle, data, tmp_path / "state", *options) as process:
        wait_for_step(tmp_path / "state", 0, process)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == os.getpriority(os.PRIO_PROCESS, 0) + 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(learning_bundle, data, tmp_path, number):
    state, step = tmp_path / "state", 0
    for _ in range(2):
        with running(learning_bundle, data, state, *ENDLESS, "--commit-every", 10**6) as process:
            wait_for_step(state, step + 1, process)  # of the end of an epoch
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert f"interrupted at step {committed_step(state)}: saved" in errors
        assert "the same command resumes" in errors
        assert committed_step(state) > step
        step = committed_step(state)
    assert_as_uninterrupted(state, learning_bundle, data, tmp_path / "whole")


KILLS = 6


@pytest.mark.slow
def test_kills_at_random_moments_lose_no_committed_step(learning_bundle, data, tmp_path):
    state, chosen, step = tmp_path / "state", random.Random(0), 0
    for _ in range(KILLS):
        with running(learning_bundle, data, state, *ENDLESS, "--commit-every", 3) as process:
            wait_for_step(state, step + 1, process)
            time.sleep(chosen.uniform(0, 0.2))
            seen = committed_step(state)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        step = committed_step(state)
        assert step >= seen
    assert_as_uninterrupted(state, learning_bundle, data, tmp_path / "whole")


@contextlib.contextmanager
def running(bundle, data, state, *options):
    command = [*COMMAND, *arguments(bundle, data, state, *options)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(state, step, process, seconds=60):
    end = time.monotonic() + seconds
    while committed_step(state) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"no step {step} in {state}"
        time.sleep(0.01)


def committed_step(state):
    """The step in the folder, of which another process may be about to rename the files; -1 without any."""
    for name in (STATE, PREVIOUS) * 2:
        with contextlib.suppress(OSError, SafetensorError), safe_open(state / name, "np") as file:
            return json.loads(file.metadata()["progress"])["step"]
    return -1


def assert_as_uninterrupted(state, bundle, data, folder):
    """Asserts that an endless training has what one has that took as many steps in one go."""
    adapter, left = Adapter.open(bundle), [committed_step(state)]

    def track(items, label, total):
        for item in items:
            if label.startswith("epoch"):
                left[0] -= 1
                if left[0] < 0:
                    raise TrainingInterrupted
            yield item

    known, classes = adapter.settings, adapter.bundle.manifest.classes
    options = AdaptOptions(
        epochs=10**6,
        batch_size=1,
        lr=LR,
        sched=known.sched,
        warmup_steps=known.warmup_steps,
        commit_every=10**6,
    )
    with pytest.raises(TrainingInterrupted):
        adapt(
            adapter,
            adapt_images(load_new_images(str(data), classes), None, None),
            options,
            folder,
            track=track,
        )
    whole = adapter.session.tensors()
    parts = load_file(state / STATE if (state / STATE).exists() else state / PREVIOUS)
    assert parts.keys() == whole.keys()
    assert all(np.array_equal(parts[name], whole[name]) for name in whole)
