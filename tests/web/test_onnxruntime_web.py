"""Does a bundle compute in onnxruntime-web, of other kernels, what it computes in onnxruntime?"""

import shutil
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.cli import app
from wasi_export.config import Config
from wasi_export.manifest import MODEL, PARAMETERS
from wasi_export.runtimes.session import Session
from wasi_export.runtimes.training_session import TrainingSession
from wasi_export.training.stage import train_run

STEPS = 5
TOLERANCE = 1e-5  # fp32, sums of some hundred products in another order: found are 5e-7
CONFIG = {
    "name": "tiny",
    "model": {
        "name": "vit_tiny_patch16_224",
        "img_size": 16,
        "kwargs": {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3},
    },
    "data": {"source": "digits", "train_images": 64, "val_images": 20},
    "subspace": {"fraction": 0.6, "calibration_images": 16, "activation": "none"},
    "train": {"dense": {"epochs": 0}, "subspace": {"epochs": 0}},
    "export": {"golden_images": 5, "train_graph": True},
    "adapt": {"trainable": "all"},
}


@dataclass(frozen=True)
class Difference:
    """The largest of any number, between the two runtimes."""

    outputs: float
    """Of the model on the golden images, over their scale."""
    losses: float
    """Of the steps."""
    state: float
    """Of parameters and optimiser after the last step."""


def difference(found, folder, rate):
    """Compares what onnxruntime-web found with what onnxruntime computes of a bundle."""
    bundle = Bundle.open(folder)
    golden = bundle.golden()
    outputs = Session.open(bundle.model_path).run(golden.images)
    session = TrainingSession.open(bundle)
    start = session.tensors()
    losses = [
        session.step(golden.images, golden.labels, lr=rate, weight_decay=0.05, clip_norm=1.0).loss
        for _ in range(STEPS)
    ]
    state = session.tensors()
    assert found["state"].keys() == state.keys()
    assert max(largest(state[name], start[name]) for name in state) > 10 * TOLERANCE
    return Difference(
        outputs=largest(found["outputs"], outputs) / float(np.abs(outputs).max()),
        losses=largest(found["losses"], losses),
        state=max(largest(found["state"][name], state[name]) for name in state),
    )


def largest(found, expected):
    return float(np.abs(np.ravel(found) - np.ravel(expected)).max())


def test_a_bundle_of_a_few_operators_computes_the_same(onnxruntime_web, learning_bundle):
    apart = difference(onnxruntime_web("run_model.mjs", learning_bundle, STEPS, 0.1), learning_bundle, 0.1)
    assert max(astuple(apart)) <= TOLERANCE, apart


@pytest.fixture(scope="module")
def run_dir(onnxruntime_web, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "subspace"
    train_run(Config.from_mapping(CONFIG), "subspace", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opset", "settings", "rate"),
    [
        (17, ["adapt.opt=momentum"], 1e-2),
        # Adam moves a parameter by its rate also where the gradient is nothing but rounding, as at the bias
        # of the keys: the rate is the default one of `adapt`.
        (23, ["adapt.opt=adamw", "adapt.activation=feature", "adapt.recompute=none"], 1e-4),
    ],
)
def test_an_exported_vit_and_its_training_step_compute_the_same(
    onnxruntime_web, run_dir, tmp_path, opset, settings, rate
):
    bundle = tmp_path / "bundle"
    overrides = [word for setting in settings for word in ("-s", setting)]
    command = ["export", str(run_dir), "-o", str(bundle), "--opset", str(opset), *overrides]
    exported = CliRunner().invoke(app, command)
    assert exported.exit_code == 0, exported.output
    found = onnxruntime_web("run_model.mjs", bundle, STEPS, rate)
    apart = difference(found, bundle, rate)
    versions = f"onnxruntime {ort.__version__}, onnxruntime-web {found['version']}"
    assert max(astuple(apart)) <= TOLERANCE, f"{versions}: {apart}"


def change_model(folder):
    model = onnx.load(folder / MODEL)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.001, weight.name))
    onnx.save(model, folder / MODEL)


def change_parameters(folder):
    parameters = load_file(folder / PARAMETERS)
    save_file(parameters | {"left": parameters["left"] * 1.001}, folder / PARAMETERS)


@pytest.mark.parametrize(
    ("change", "parts"), [(change_model, {"outputs"}), (change_parameters, {"losses", "state"})]
)
def test_the_comparison_finds_a_changed_weight(onnxruntime_web, learning_bundle, tmp_path, change, parts):
    other = Path(shutil.copytree(learning_bundle, tmp_path / "other"))
    change(other)
    write_bundle_manifest(other, Bundle.open(learning_bundle).manifest)
    apart = difference(onnxruntime_web("run_model.mjs", other, STEPS, 0.1), learning_bundle, 0.1)
    assert {part for part, error in vars(apart).items() if error > 10 * TOLERANCE} == parts, apart
