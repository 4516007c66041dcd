"""The export command on a real run and on plain checkpoints: what it writes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from helpers import make_images, require_schema
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from wasi_export.artifact import Bundle
from wasi_export.cli import app
from wasi_export.cli._quantize import MAX_DROP
from wasi_export.cli.export import name_of
from wasi_export.config import Config, Thresholds
from wasi_export.datasets import load_data
from wasi_export.errors import ExitCode
from wasi_export.ranks import Plan
from wasi_export.runtimes.parity import measure_parity
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.validate import validate
from wasi_export.training.stage import train_run

KWARGS = {"patch_size": 4, "embed_dim": 96, "depth": 1, "num_heads": 3}
CONFIG = {
    "name": "tiny",
    "model": {"name": "vit_tiny_patch16_224", "img_size": 16, "kwargs": KWARGS},
    "data": {"source": "digits", "train_images": 64, "val_images": 20},
    "subspace": {"fraction": 0.6, "calibration_images": 16},
    "train": {"dense": {"epochs": 0}, "subspace": {"epochs": 0}},
    "export": {"golden_images": 5},
}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def inspected(bundle: Path) -> str:
    return CliRunner().invoke(app, ["inspect", str(bundle)]).stdout


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished subspace run, to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "subspace"
    train_run(Config.from_mapping(CONFIG), "subspace", folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a `test_vit` with a head of seven classes."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve images without classes."""
    folder = tmp_path_factory.mktemp("calibration")
    rng = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{index:02}.png")
    return folder


@pytest.mark.slow
def test_a_run_becomes_a_bundle_that_checks_itself(run_dir: Path, tmp_path: Path) -> None:
    result = call(run_dir, "-o", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    manifest = bundle.manifest
    assert (manifest.name, manifest.model.method, manifest.classes) == (
        "tiny",
        "subspace",
        tuple("0123456789"),
    )
    assert any(layer.rank is not None for layer in manifest.model.layers)
    assert (manifest.opset, manifest.min_onnxruntime) == (23, "1.23")
    assert {"val_accuracy", "val_loss"} <= manifest.metrics.keys()
    assert set(files_in(bundle.path)) == {
        "manifest.json", "manifest.sha256", "model.onnx", "golden/golden.safetensors",
        "config.toml", "plan.json",
    }  # fmt: skip
    errors = [parity.max_error for parity in measure_parity(bundle.model_path, bundle.golden())]
    assert max(errors) <= manifest.parity_error <= 1e-5
    assert len(errors) == 6


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224"),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", "hf-hub-timm-vit_tiny_patch16_224"),
        ("hf_hub:me/my model", "hf_hub-me-my-model"),
    ],
)
def test_a_bundle_is_called_after_the_model_in_letters_that_a_name_may_have(model: str, name: str) -> None:
    assert Config.from_mapping({"name": name_of(model)}).name == name


def test_a_model_of_a_hub_is_not_refused_for_its_name(images: Path, tmp_path: Path) -> None:
    result = call("--model", "hf-hub:no/such", "--calibration", images, "--opset", 99, "-o", tmp_path / "b")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "export.opset: " in result.stderr
    assert "name: " not in result.stderr


@pytest.mark.slow
def test_the_golden_images_are_preprocessed_validation_images(run_dir: Path, tmp_path: Path) -> None:
    call(run_dir, "-o", tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    golden, validation = bundle.golden(), load_data(Config.from_mapping(CONFIG).data)[1]
    assert golden.images.shape == (5, 3, 16, 16)
    preprocess = Preprocess(bundle.manifest.input)
    known = [(preprocess(image), label) for image, label in (validation[i] for i in range(len(validation)))]
    for image, label in zip(golden.images, golden.labels, strict=True):
        assert any(np.array_equal(image, other) and label == truth for other, truth in known)


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("one", "two"):
        assert call(run_dir, "-o", tmp_path / name).exit_code == 0
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    assert Bundle.open(tmp_path / "one").manifest.created == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    result = call(run_dir, "-o", tmp_path / "three")
    assert (result.exit_code, (tmp_path / "three").exists()) == (2, False)
    assert "SOURCE_DATE_EPOCH must be seconds since 1970, got 'yesterday'" in result.output


@pytest.mark.slow
def test_an_export_that_differs_from_torch_fails_and_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict"
    strict.mkdir()
    for name, content in files_in(run_dir).items():
        (strict / name).write_bytes(content)
    text = (strict / "config.toml").read_text()
    config = Config.from_toml(strict / "config.toml", ["thresholds.max_parity_error=1e-12"])
    assert config.to_toml() != text
    (strict / "config.toml").write_text(config.to_toml())
    result = call(strict, "-o", tmp_path / "bundle", "--json")
    assert result.exit_code == 1
    assert "the tolerance is 1e-12 of the output scale" in result.output
    assert json.loads(result.stdout)["error"]["type"] == "ParityError"
    assert [path.name for path in tmp_path.iterdir()] == ["strict"]


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["auto", "always"])
def test_factors_are_multiplied_out_where_that_is_asked_for(run_dir: Path, tmp_path: Path, fold: str) -> None:
    result = call(run_dir, "-o", tmp_path / "bundle", "--fold", fold)
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    layers = bundle.manifest.model.layers
    assert Plan.load(bundle.path / "plan.json").layers == layers
    names = {tensor.name for tensor in onnx.load(bundle.model_path).graph.initializer}
    factored = {layer.name for layer in Plan.load(run_dir / "plan.json").factored}
    for layer in (layer for layer in layers if layer.name in factored):
        dense = layer.rank is None
        assert (f"{layer.name}.weight" in names or f"{layer.name}.weight[:96]" in names) == dense
        if fold == "always":
            assert (dense, layer.reason) == (True, "folded, as asked for")
        else:
            assert layer.dense_ms is not None
            assert layer.factored_ms is not None
            assert dense == (layer.dense_ms < layer.factored_ms)
    assert bundle.manifest.parity_error <= 1e-5


@pytest.mark.slow
def test_a_graph_that_takes_pixels_gives_the_same_answers(run_dir: Path, tmp_path: Path) -> None:
    for name, flags in (("plain", ()), ("pixels", ("--fold-normalization",))):
        result = call(run_dir, "-o", tmp_path / name, *flags)
        assert result.exit_code == 0, result.output
    plain, pixels = (Bundle.open(tmp_path / name) for name in ("plain", "pixels"))
    channels = plain.manifest.input.channels
    assert pixels.manifest.input == plain.manifest.input.model_copy(
        update={"mean": (0.0,) * channels, "std": (1.0,) * channels}
    )
    assert 0 <= pixels.golden().images.min() < pixels.golden().images.max() <= 1
    np.testing.assert_array_equal(pixels.golden().outputs, plain.golden().outputs)
    images = load_data(Config.from_mapping(CONFIG).data)[1]
    found = [validate(bundle, Thresholds(), images=images) for bundle in (plain, pixels)]
    accuracies = [
        next(check.value for check in report.checks if check.name == "accuracy") for report in found
    ]
    assert accuracies[0] == accuracies[1]
    refused = CliRunner().invoke(app, ["train-graph", str(tmp_path / "pixels"), str(run_dir)])
    assert refused.exit_code == 2
    assert "exported with fold_normalization" in refused.stderr
    refused = call(run_dir, "-o", tmp_path / "both", "--fold-normalization", "--train-graph")
    assert refused.exit_code == 2
    assert "choose one of the two" in refused.stderr


@pytest.mark.slow
def test_a_graph_in_half_is_added_and_validated(run_dir: Path, tmp_path: Path) -> None:
    result = call(run_dir, "-o", tmp_path / "bundle", "--quantize", "fp16-storage")
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "bundle")
    facts, path = bundle.manifest.quantized, bundle.quantized_path
    assert facts is not None
    assert path == tmp_path / "bundle" / "model.fp16.onnx"
    assert path.stat().st_size < 0.7 * bundle.model_path.stat().st_size
    assert facts.error < 5e-3
    assert facts.images == 20
    assert str(facts) in inspected(tmp_path / "bundle")
    report = validate(bundle, Thresholds(), images=load_data(Config.from_mapping(CONFIG).data)[1])
    checks = {check.name: check.status for check in report.checks}
    assert (checks["fp16-storage error"], checks["fp16-storage accuracy drop"]) == ("passed", "info")
    wrong = facts.model_copy(update={"error": 0.1 * facts.error})
    forged = replace(bundle, manifest=bundle.manifest.model_copy(update={"quantized": wrong}))
    assert validate(forged, Thresholds()).exit_code == ExitCode.CHECK_FAILED


@pytest.mark.slow
def test_int8_is_shipped_only_if_it_is_good_enough(run_dir: Path, tmp_path: Path) -> None:
    result = call(run_dir, "-o", tmp_path / "auto", "--quantize", "auto")
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "auto")
    facts = bundle.manifest.quantized
    assert facts is not None
    good = facts.accuracy_drop <= MAX_DROP and facts.latency_ratio < 1
    assert (bundle.path / "model.int8.onnx").exists() == good == (facts.reason == "")
    wanted = call(run_dir, "-o", tmp_path / "int8", "--quantize", "int8")
    if not good:
        assert wanted.exit_code == 1
        assert not (tmp_path / "int8").exists()
        assert f"int8 {facts.reason.split()[0]}" in wanted.stderr


@pytest.mark.slow
def test_a_bundle_is_replaced_only_by_force(run_dir: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert call(run_dir, "-o", bundle).exit_code == 0
    before = files_in(bundle)
    result = call(run_dir, "-o", bundle, "--opset", "20")
    assert result.exit_code == 2
    assert "exists: choose another name or give --force" in result.output
    assert files_in(bundle) == before
    result = call(run_dir, "-o", bundle, "--opset", "20", "--force", "--json")
    require_schema("manifest", result.stdout)
    assert json.loads(result.stdout)["opset"] == Bundle.open(bundle).manifest.opset == 20


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "whitened", "plain", "dense"])
def test_a_checkpoint_keeps_its_head_and_needs_no_training(
    method: str | None, checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    options = ("--checkpoint", checkpoint, "--calibration", images)
    options += () if method is None else ("--method", method)
    options += () if method == "dense" else ("--fraction", "0.7")
    result = call("--model", "test_vit", *options, "-o", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.classes == tuple("0123456")
    assert manifest.model.method == ("dense" if method == "dense" else "subspace")
    assert {layer.method for layer in manifest.model.layers if layer.rank} == {method or "sequential"} - {
        "dense"
    }


@pytest.mark.slow
def test_a_run_is_not_checked_with_images_of_other_classes(run_dir: Path, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images")
    result = call(run_dir, "-s", f"data.source={folder}", "-o", tmp_path / "bundle")
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {folder} has 2 classes and the model was trained on 10, they differ in "
        "0, 1, 2, 3, 4, …: bring the images back, or train again\n"
    )


PLAIN = ("--model", "test_vit", "--checkpoint", "CHECKPOINT", "--calibration", "IMAGES")

REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "nothing": ((), 2, "give either the folder of a run or --model NAME"),
    "both": (("RUN", "--model", "test_vit"), 2, "give either the folder of a run or --model NAME"),
    "a run with options of a model": (("RUN", "--rank", "64"), 2, "--rank goes with --model"),
    "a run with a method": (("RUN", "--method", "dense"), 2, "--method goes with --model"),
    "ranks of what is dense": (
        (*PLAIN, "--method", "dense", "--rank", "8"),
        2,
        "--rank is of factors, which --method dense has not",
    ),
    "no run there": (("MISSING",), 6, "holds no finished run"),
    "an opset that is too old": (("RUN", "--opset", "11"), 2, "export.opset: Input should be greater than"),
    "the same for a model": ((*PLAIN, "--opset", "11"), 2, "export.opset: Input should be greater than"),
    "no images": (("--model", "test_vit"), 2, "--model needs --calibration DIR"),
    "an empty folder": ((*PLAIN[:-1], "EMPTY"), 5, "no images in"),
    "an image that is not one": ((*PLAIN[:-1], "BROKEN"), 2, "cannot be read: broken.png"),
    "random weights": (("--model", "test_vit", "--calibration", "IMAGES"), 2, "test_vit has random weights"),
    "an unknown model": (
        ("--model", "test_vitt", *PLAIN[2:]),
        2,
        "no model 'test_vitt': did you mean test_vit",
    ),
    "another model's checkpoint": (("--model", "test_vit2", *PLAIN[2:]), 2, "does not fit the model"),
    "rank 0": (
        (*PLAIN, "--rank", "0"),
        2,
        "subspace.rank: Input should be greater than or equal to 1, got 0",
    ),
    "epsilon 1.7": (
        (*PLAIN, "--epsilon", "1.7"),
        2,
        "subspace.epsilon: Input should be less than or equal to 1",
    ),
    "two measures": (
        (*PLAIN, "--rank", "32", "--fraction", "0.4"),
        2,
        "give one of epsilon, fraction and rank",
    ),
    "nothing that pays": ((*PLAIN, "--rank", "64"), 2, "no layer of test_vit pays to factor"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_exported_is_refused_in_one_line(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    run_dir: Path,
    checkpoint: Path,
    images: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.png").write_bytes(b"no image")
    paths = {
        "RUN": run_dir,
        "MISSING": tmp_path / "missing",
        "CHECKPOINT": checkpoint,
        "IMAGES": images,
        "EMPTY": tmp_path / "empty",
        "BROKEN": tmp_path / "broken",
    }
    before = sorted(tmp_path.iterdir())
    result = call(*(paths.get(argument, argument) for argument in arguments), "-o", tmp_path / "bundle")
    assert (result.exit_code, sorted(tmp_path.iterdir())) == (code, before), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
