"""The way of what a board has learnt: into a new bundle without torch, and back to torch."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import require_schema
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from wasi_export.artifact import Bundle
from wasi_export.cli import app
from wasi_export.config import Config
from wasi_export.datasets import load_data
from wasi_export.manifest import PARAMETERS
from wasi_export.runtimes.accuracy import predict
from wasi_export.runtimes.adapter import Adapter
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session
from wasi_export.training.beginning import begin
from wasi_export.training.checkpoint import load_run
from wasi_export.training.optim import create_optimizer
from wasi_export.training.stage import train_run
from wasi_export.training.warm_optimizer import take_over

pytestmark = pytest.mark.slow
CLASSES = tuple("0123456789")
KWARGS = {"patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3, "init_values": 0.1}
STAGE = {"epochs": 0, "lr": 1e-3, "weight_decay": 0.05, "clip_grad": 1.0}
CONFIG: Mapping[str, Any] = {
    "name": "tiny",
    "model": {"name": "vit_tiny_patch16_224", "img_size": 16, "kwargs": KWARGS},
    "data": {"source": "digits", "train_images": 64, "val_images": 60},
    "subspace": {"fraction": 0.6, "calibration_images": 16, "activation": "none"},
    "train": {"dense": STAGE, "subspace": STAGE},
    "export": {"golden_images": 5, "train_graph": True},
    "adapt": {"trainable": "all", "lr": 1e-3},
}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished subspace run, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "subspace"
    train_run(Config.from_mapping(CONFIG), "subspace", folder)
    return folder


@pytest.fixture(scope="module")
def bundle(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, with a training step of all parameters, to be read only."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    assert call("export", run_dir, "-o", folder).exit_code == 0
    return folder


def batches(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((6, 3, 16, 16), np.float32), rng.integers(0, 10, 6)) for _ in range(count)]


@pytest.fixture(scope="module")
def state(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the bundle is after three steps."""
    folder = tmp_path_factory.mktemp("states") / "state"
    adapter = Adapter.open(bundle)
    for images, labels in batches(3):
        adapter.step(images, labels)
    adapter.save(folder)
    return folder


def test_a_state_without_steps_merges_into_the_same_model(bundle: Path, tmp_path: Path) -> None:
    Adapter.open(bundle).save(tmp_path / "state")
    result = call("merge", bundle, tmp_path / "state", "-o", tmp_path / "new")
    assert result.exit_code == 0, result.output
    for name in ("model.onnx", "train/step.onnx", "train/evaluate.onnx", "plan.json"):
        assert (tmp_path / "new" / name).read_bytes() == (bundle / name).read_bytes()
    old, new = Bundle.open(bundle).golden(), Bundle.open(tmp_path / "new").golden()
    np.testing.assert_allclose(new.outputs, old.outputs, atol=1e-5 * np.abs(old.outputs).max())


def test_a_merged_bundle_answers_as_the_board_that_learnt(bundle: Path, state: Path, tmp_path: Path) -> None:
    result = call("merge", bundle, state, "-o", tmp_path / "new", "--data", "digits", "--json")
    assert result.exit_code == 0, result.output
    require_schema("merge", result.stdout)
    found = json.loads(result.stdout)
    adapter, images = Adapter.open(bundle), load_data(Config.from_mapping(CONFIG).data)[1]
    adapter.load(state)
    new = Bundle.open(tmp_path / "new")
    answers = predict(Session.open(new.model_path), images, Preprocess(new.manifest.input))
    np.testing.assert_array_equal(answers, adapter.predict([images[i][0] for i in range(len(images))]))
    assert found["parity_error"] <= 1e-5 < found["change"]
    assert {found["accuracy"], found["accuracy_before"]} <= {n / 359 for n in range(360)}  # of all its images
    trained = load_file(new.path / PARAMETERS)
    for name, value in adapter.weights().items():
        np.testing.assert_array_equal(trained[name], value)
    assert call("validate", new.path).exit_code == 0
    assert new.manifest.merged is not None
    assert new.manifest.merged.shares == (1.0,)


def test_a_merged_bundle_goes_on_learning(bundle: Path, state: Path, tmp_path: Path) -> None:
    assert call("merge", bundle, state, "-o", tmp_path / "new").exit_code == 0
    (images, labels), *_ = batches(1)
    before, after = Adapter.open(bundle), Adapter.open(tmp_path / "new")
    before.load(state)
    assert after.step(images, labels) == pytest.approx(before.step(images, labels), abs=1e-6)


def test_several_states_are_averaged_by_their_shares(bundle: Path, state: Path, tmp_path: Path) -> None:
    Adapter.open(bundle).save(tmp_path / "start")
    shares = ("--share", "3", "--share", "1")
    result = call("merge", bundle, state, tmp_path / "start", "-o", tmp_path / "new", *shares)
    assert result.exit_code == 0, result.output
    learnt, start, mean = (
        load_file(path / PARAMETERS) for path in (tmp_path / "new", bundle, tmp_path / "new")
    )
    adapter = Adapter.open(bundle)
    adapter.load(state)
    learnt = adapter.weights()
    expected = 0.75 * learnt["head.weight"] + 0.25 * start["head.weight"]
    np.testing.assert_allclose(mean["head.weight"], expected, atol=1e-6)
    assert Bundle.open(tmp_path / "new").manifest.merged.shares == (0.75, 0.25)


def test_torch_goes_on_as_if_it_had_never_left(
    run_dir: Path, bundle: Path, state: Path, tmp_path: Path
) -> None:
    result = call("merge", bundle, state, "--to", "torch", "-o", tmp_path / "back")
    require_schema("run", (tmp_path / "back" / "run.json").read_bytes())
    assert result.exit_code == 0, result.output
    config = Config.from_mapping(CONFIG)
    stayed, back = begin(config, CLASSES, run_dir), begin(config, CLASSES, tmp_path / "back")
    assert back.optimizer is not None
    losses: dict[str, list[float]] = {}
    for name, begun, data in (("stayed", stayed, batches(6)), ("left", back, batches(6)[3:])):
        optimizer = create_optimizer(begun.model, config.train.subspace)
        if begun.optimizer is not None:
            take_over(optimizer, begun.model, begun.optimizer)
        losses[name] = []
        for images, labels in data:
            loss = F.cross_entropy(begun.model(torch.from_numpy(images)), torch.from_numpy(labels))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(begun.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["left"] == pytest.approx(losses["stayed"][3:], abs=1e-5)  # rounding, through Adam's √v
    fresh = begin(config, CLASSES, run_dir).model
    with torch.no_grad():
        images, labels = batches(4)[3]
        unlearnt = F.cross_entropy(fresh(torch.from_numpy(images)), torch.from_numpy(labels)).item()
    assert abs(unlearnt - losses["left"][0]) > 1e-3


def test_the_way_to_torch_keeps_every_bit(run_dir: Path, bundle: Path, tmp_path: Path) -> None:
    Adapter.open(bundle).save(tmp_path / "state")
    assert call("merge", bundle, tmp_path / "state", "--to", "torch", "-o", tmp_path / "back").exit_code == 0
    before, after = load_run(run_dir).model.state_dict(), load_run(tmp_path / "back").model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    options = ("--method", "subspace", "--init", tmp_path / "back", "-o", tmp_path / "again")
    path = tmp_path / "config.toml"
    path.write_text(Config.from_mapping({**CONFIG, "train": {"subspace": {**STAGE, "epochs": 1}}}).to_toml())
    result = call("train", path, *options)
    assert result.exit_code == 0, result.output


def test_a_folded_layer_is_merged_too(run_dir: Path, tmp_path: Path) -> None:
    options = ("--fold", "always", "--trainable", "factors")
    assert call("export", run_dir, "-o", tmp_path / "folded", *options).exit_code == 0
    adapter = Adapter.open(tmp_path / "folded")
    for images, labels in batches(2):
        adapter.step(images, labels)
    adapter.save(tmp_path / "state")
    result = call("merge", tmp_path / "folded", tmp_path / "state", "-o", tmp_path / "new")
    assert result.exit_code == 0, result.output
    (images, _), *_ = batches(1)
    found = Session.open(tmp_path / "new" / "model.onnx").run(images)
    np.testing.assert_allclose(found, adapter.session.outputs(images), atol=1e-5)
    result = call("merge", tmp_path / "folded", tmp_path / "state", "--to", "torch", "-o", tmp_path / "back")
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        again = load_run(tmp_path / "back").model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(again, found, atol=1e-5)


def test_a_state_of_every_kind_of_step_is_merged(run_dir: Path, tmp_path: Path) -> None:
    wsi = ("update=wsi", "factor_lr=0.01", "activation=feature", "accumulate=true", "opt=momentum")
    settings = [word for value in wsi for word in ("-s", f"adapt.{value}")]
    result = call("export", run_dir, "-o", tmp_path / "b", "--train-graph", *settings)
    assert result.exit_code == 0, result.output
    adapter = Adapter.open(tmp_path / "b")
    for images, labels in batches(2):
        adapter.step(images, labels, micro_batch=4)
    adapter.save(tmp_path / "state")
    result = call("merge", tmp_path / "b", tmp_path / "state", "-o", tmp_path / "new")
    assert result.exit_code == 0, result.output
    (images, labels), *_ = batches(1)
    found = Session.open(tmp_path / "new" / "model.onnx").run(images)
    np.testing.assert_allclose(found, adapter.session.outputs(images), atol=1e-5)
    assert np.isfinite(Adapter.open(tmp_path / "new").step(images, labels, micro_batch=2))
    result = call("merge", tmp_path / "b", tmp_path / "state", "--to", "torch", "-o", tmp_path / "back")
    assert result.exit_code == 0, result.output


def test_a_quantised_bundle_is_quantised_again(run_dir: Path, tmp_path: Path) -> None:
    options = ("--quantize", "fp16-storage")
    assert call("export", run_dir, "-o", tmp_path / "half", *options).exit_code == 0
    Adapter.open(tmp_path / "half").save(tmp_path / "state")
    result = call("merge", tmp_path / "half", tmp_path / "state", "-o", tmp_path / "new")
    assert result.exit_code == 2
    assert "model.fp16.onnx, and a new one has to be judged: give --data" in result.stderr
    result = call("merge", tmp_path / "half", tmp_path / "state", "-o", tmp_path / "new", "--data", "digits")
    assert result.exit_code == 0, result.output
    assert Bundle.open(tmp_path / "new").quantized_path is not None


def test_merging_needs_no_torch(bundle: Path, state: Path, tmp_path: Path) -> None:
    arguments = ["merge", str(bundle), str(state), "-o", str(tmp_path / "new")]
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'torchvision'): sys.modules[name] = None\n"
        "from wasi_export.cli import app\n"
        f"app({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_state_of_another_bundle_is_refused(
    run_dir: Path, bundle: Path, state: Path, tmp_path: Path
) -> None:
    assert call("export", run_dir, "-o", tmp_path / "other", "--trainable", "head").exit_code == 0
    result = call("merge", tmp_path / "other", state, "-o", tmp_path / "new")
    assert result.exit_code == 2
    assert "is a state of another bundle" in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("BUNDLE", "nowhere", "-o", "new"), 6, "no state at"),
        (("BUNDLE", "STATE", "-o", "new", "--share", "1", "--share", "2"), 2, "1 states and 2 shares"),
        (("BUNDLE", "STATE", "-o", "BUNDLE"), 2, "exists: choose another name or give --force"),
        (("BUNDLE", "STATE", "-o", "new", "--to", "torch", "--data", "digits"), 2, "--data goes with"),
        (("BUNDLE", "STATE", "-o", "new", "--data", "nowhere"), 2, "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(
    bundle: Path, state: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    places = {"BUNDLE": bundle, "STATE": state, "new": tmp_path / "new", "nowhere": tmp_path / "nowhere"}
    result = call("merge", *(places.get(argument, argument) for argument in arguments))
    assert (result.exit_code, message in result.stderr) == (code, True), result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_training_step_is_added_to_a_bundle_of_its_run(run_dir: Path, bundle: Path, tmp_path: Path) -> None:
    assert call("export", run_dir, "-o", tmp_path / "b").exit_code == 0
    before = (bundle / "model.onnx").read_bytes()
    result = call("train-graph", tmp_path / "b", run_dir, "--trainable", "head", "-s", "adapt.opt=sgd")
    assert result.exit_code == 0, result.output
    found = Bundle.open(tmp_path / "b")
    assert found.manifest.training.parameters == ("head.weight", "head.bias")
    assert found.manifest.training.settings.opt == "sgd"
    assert found.model_path.read_bytes() == before


def test_a_training_step_of_another_run_is_refused(run_dir: Path, bundle: Path, tmp_path: Path) -> None:
    train_run(Config.from_mapping({**CONFIG, "seed": 1}), "subspace", tmp_path / "other")
    before = (bundle / "manifest.json").read_bytes()
    result = call("train-graph", bundle, tmp_path / "other")
    assert result.exit_code == 1
    assert "was not exported from" in result.stderr
    assert (bundle / "manifest.json").read_bytes() == before
