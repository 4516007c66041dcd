"""A tiny real bundle and tiny real images, for tests that need no torch."""

import json
from pathlib import Path

import jsonschema
import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper, parser
from PIL import Image
from safetensors.numpy import save_file
from training_step_text import MOMENTS, NAMES, evaluate_model, step_model

from wasi_export.artifact import write_bundle_manifest
from wasi_export.config import AdaptConfig
from wasi_export.manifest import (
    EVALUATE,
    GOLDEN,
    MODEL,
    PARAMETERS,
    STEP,
    InputSpec,
    Manifest,
    ModelFacts,
    TrainingGraph,
)
from wasi_export.ranks import LayerPlan

TRAINING = TrainingGraph(
    settings=AdaptConfig(
        opt="momentum",
        lr=0.1,
        weight_decay=0.0,
        clip_grad=None,
        recompute="none",
        batch_size=4,
        warmup_steps=0,
    ),
    parameters=NAMES,
    optimizer=MOMENTS,
    frozen=(),
    model_parameters=102,
    parity_error=0.0,
)
SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"
CLASSES = ("dark", "light")
SIZE = 4
SPEC = InputSpec(height=SIZE, width=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)

# Tells dark images from light ones by the mean of the pixels; `extra` runs beside it and counts for little.
MODEL_TEXT = """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
brightness (float[{batch}, 3, 4, 4] images) => (float[{batch}, 2] logits)
<float[2, 48] right, float[2, 2] left, float[2] bias>
{{
    flat = Flatten (images)
    code = Gemm <transB = 1> (flat, right)
    logits = Gemm <transB = 1> (code, left, bias)
}}
"""


def factors() -> dict[str, NDArray[np.float32]]:
    """Returns the initializers of the model by name."""
    extra = np.random.default_rng(0).standard_normal(48).astype(np.float32) / 48
    return {
        "right": np.stack([np.full(48, 1 / 48, np.float32), extra]),
        "left": np.array([[-4, 0.1], [4, -0.1]], np.float32),
        "bias": np.array([0.0, 0.1], np.float32),
    }


def make_model(*, opset: int = 23, ir_version: int = 10, batch: str = "B", sign: int = 1) -> bytes:
    """Returns the ONNX file of the model; with sign -1 it takes dark for light."""
    model = parser.parse_model(MODEL_TEXT.format(opset=opset, ir_version=ir_version, batch=batch))
    weights = factors() | {"left": np.float32(sign) * factors()["left"]}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model.SerializeToString()


def reference(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns what the model should give, computed in float64."""
    weights = {name: value.astype(np.float64) for name, value in factors().items()}
    code = images.reshape(-1, 48) @ weights["right"].T
    return (code @ weights["left"].T + weights["bias"]).astype(np.float32)


def make_bundle(
    folder: Path,
    *,
    model: bytes | None = None,
    classes: tuple[str, ...] = CLASSES,
    golden_images: int = 5,
    golden_error: float = 0.0,
    training: bool = False,
) -> Path:
    """Writes a bundle into a folder; `golden_error` is added to one reference output, times their scale.

    With `training` it has a training step, that of `training_step_text.py`.
    """
    (folder / "golden").mkdir(parents=True)
    (folder / MODEL).write_bytes(model or make_model())
    images = np.random.default_rng(1).standard_normal((golden_images, 3, SIZE, SIZE)).astype(np.float32)
    outputs = reference(images)
    if golden_images:
        outputs[-1, 0] += golden_error * np.abs(outputs).max()
    golden = {"images": images, "outputs": outputs, "labels": outputs.argmax(axis=1).astype(np.int64)}
    save_file(golden, folder / GOLDEN)
    (folder / "config.toml").write_text('name = "tiny"\n')
    manifest = make_manifest(classes=classes)
    if training:
        (folder / "train").mkdir()
        (folder / STEP).write_bytes(step_model())
        (folder / EVALUATE).write_bytes(evaluate_model())
        save_file(factors(), folder / PARAMETERS)
        manifest = manifest.model_copy(update={"training": TRAINING})
    write_bundle_manifest(folder, manifest)
    return folder


def make_manifest(*, classes: tuple[str, ...] = CLASSES) -> Manifest:
    """Returns the manifest of the model, without files."""
    return Manifest(
        name="tiny",
        model=ModelFacts(
            name="brightness",
            method="subspace",
            parameters=102,
            layers=(
                LayerPlan(
                    name="head",
                    in_features=48,
                    out_features=2,
                    rank=2,
                    method="whitened",
                    energy=0.95,
                    reason="rank as given",
                ),
                LayerPlan(
                    name="blocks.0.mlp.fc1",
                    in_features=6,
                    out_features=3,
                    rank=None,
                    method=None,
                    energy=None,
                    reason="dense: rank 32 is not below break-even 2",
                ),
            ),
        ),
        classes=classes,
        input=SPEC,
        opset=23,
        ir_version=10,
        min_onnxruntime="1.23.0",
        parity_error=1e-7,
        seed=0,
        data_fingerprint=None,
        metrics={"val_top1": 0.75},
        tools={"torch": "2.9.0"},
        created="2026-01-01T00:00:00Z",
    )


def make_images(folder: Path, *, wrong: int = 0) -> Path:
    """Writes two black and two white images into class folders, the first `wrong` black ones as `light`."""
    for label, grey in enumerate((0, 255)):
        for index in range(2):
            mislabelled = label == 0 and index < wrong
            path = folder / CLASSES[1 if mislabelled else label] / f"{grey}-{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 7), (grey, grey, grey)).save(path)
    return folder


def require_schema(name: str, text: str | bytes) -> None:
    """Fails unless a JSON document is valid under the schema that is published for it."""
    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
