"""Training on two real processes, gloo on the processor, against one process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError
from wasi_export.training.processes import check_shares, largest_share, share_evaluation

TOGETHER = Path(__file__).with_name("train_together.py")
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@given(images=st.integers(1, 60), batch_size=st.integers(1, 9), processes=st.integers(1, 5))
def test_evaluation_deals_out_every_batch_once(images, batch_size, processes):
    loader = DataLoader(torch.arange(images), batch_size=batch_size)
    shares = [
        [batch.tolist() for batch in share_evaluation(loader, processes=processes, index=index)]
        for index in range(processes)
    ]
    dealt = sorted(batch for share in shares for batch in share)
    assert dealt == [batch.tolist() for batch in loader]
    assert max(map(len, shares)) == largest_share(len(loader), processes=processes)


@pytest.mark.parametrize(
    ("batch_size", "config", "message"),
    [
        (9, {}, r"batch of 9 images cannot be shared by 2 processes"),
        (6, {"mixup": 0.2}, r"must be a multiple of 4 on 2 processes, got 6"),
        (8, {"memory": {"update_in_backward": True}}, r"update_in_backward updates before .* are averaged"),
    ],
)
def test_what_two_processes_cannot_share_is_refused(batch_size, config, message):
    train = TrainConfig.model_validate(config)
    check_shares(batch_size, train, processes=1)
    with pytest.raises(ConfigError, match=message):
        check_shares(batch_size, train, processes=2)


def test_a_batch_that_can_be_shared_is_taken():
    check_shares(8, TrainConfig(mixup=0.2), processes=2)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Returns the folders of the trainings on one process and on two."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "tiny.toml").write_text(tiny().to_toml())
    folders = {}
    for processes, launcher in ((1, [sys.executable]), (2, LAUNCHER)):
        folders[processes] = folder / str(processes)
        folders[processes].mkdir()
        command = [*launcher, TOGETHER, folder / "tiny.toml", folders[processes]]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folders


def losses(folder, case, process=0):
    """Returns the losses of every epoch, training and validation in turns."""
    lines = (folder / f"{case}-{process}.jsonl").read_text().splitlines()
    return [loss for line in map(json.loads, lines) for loss in (line["train_loss"], line["val_loss"])]


CASES = ("dense", "factored", "right", "lora", "compressed", "wsi", "micro")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_processes_end_with_the_same_weights_and_metrics(trained, case):
    first, second = (load_file(trained[2] / f"{case}-{process}.safetensors") for process in (0, 1))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert losses(trained[2], case, 0) == losses(trained[2], case, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        # The same images and gradients, summed in another order: one rounding of fp32 is 6e-8, and Adam makes
        # a whole step of the rounding of a gradient that is nearly zero. Ten steps gave 2e-7 and less.
        ("dense", 1e-5),
        ("factored", 1e-5),
        ("right", 1e-5),
        ("lora", 1e-5),  # the frozen weights are those of the main process too
        ("micro", 1e-5),  # several backward passes a step, on dense layers
        ("compressed", 1e-5),  # the bases move twice
        ("wsi", 1e-5),
    ],
)
def test_two_processes_have_the_losses_of_one(trained, case, tolerance):
    assert losses(trained[2], case) == pytest.approx(losses(trained[1], case), rel=tolerance)


@pytest.mark.slow
def test_half_of_each_batch_has_other_losses(trained):
    """The tolerance above can be missed: by processes of which each would see its share alone."""
    assert losses(trained[1], "half") != pytest.approx(losses(trained[1], "dense"), rel=1e-3)


@pytest.mark.slow
def test_frozen_factors_stay_and_the_others_move(trained):
    frozen, free = (load_file(trained[2] / f"{case}-0.safetensors") for case in ("right", "factored"))
    name = "blocks.0.mlp.fc1"
    assert not torch.equal(frozen[f"{name}.left"], free[f"{name}.left"])
    assert not torch.equal(frozen[f"{name}.right"], free[f"{name}.right"])
    identity = frozen[f"{name}.left"].T @ frozen[f"{name}.left"]
    torch.testing.assert_close(identity, torch.eye(len(identity)), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_error_of_the_main_process_is_raised_on_all(trained):
    texts = [(trained[2] / f"error-{process}.txt").read_text() for process in (0, 1)]
    assert texts == ["seen by the main process"] * 2


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_one_signal_stops_all_processes_and_the_same_command_resumes(tiny, tmp_path):
    """The signal goes to the second process alone; the first learns of it before its next step, and saves."""
    (tmp_path / "tiny.toml").write_text(tiny("train.subspace.epochs=6").to_toml())
    command = ["-m", "wasi_export", "train", tmp_path / "tiny.toml", "--method", "subspace", "-o"]
    process = subprocess.Popen(
        [*LAUNCHER, *command, tmp_path / "run"],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert any(line.startswith("epoch 2: ") for line in process.stderr)
    workers = psutil.Process(process.pid).children()
    (second,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[1]
    saved = f"saved {tmp_path / 'run' / 'checkpoint.safetensors'}, the same command resumes"
    assert saved in text
    assert not (tmp_path / "run" / "run.json").exists()
    for folder in ("run", "whole"):
        done = subprocess.run(
            [*LAUNCHER, *command, tmp_path / folder],
            env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("val_accuracy") == 1  # only one process prints
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
