"""The forward graphs of which `step_graph_ort_training.py` makes training artifacts."""

import json
import subprocess
import time
import warnings
from pathlib import Path

import torch
from step_graph_models import SIZE, make_case
from timm.layers import Attention

from wasi_export.subspace import subspace_layers

ORT_TRAINING = "onnxruntime-training 1.19.2, plain SGD"
"""The way, as the table calls it: momentum is not among its optimizers."""
ORT_CASES = ("dense", "factors")
OPSET = 16  # 17 and 18 write LayerNormalization, of which it builds no gradient


def write_ort_training(name: str, folder: Path, python: str) -> dict[str, float]:
    """Writes the artifacts of a case with the python of the other environment; returns facts of them."""
    place = folder / f"{name} {ORT_TRAINING}"
    place.mkdir()
    start = time.process_time()
    trained = write_forward(name, place)
    seconds = time.process_time() - start
    worker = str(Path(__file__).with_name("step_graph_ort_training.py"))
    done = subprocess.run(
        [python, worker, "artifacts", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"training artifacts of {name} failed:\n{done.stderr}")
    facts: dict[str, float] = json.loads(done.stdout)
    return facts | {"trained": trained, "export_s": facts["export_s"] + seconds}


def write_forward(name: str, place: Path) -> int:
    """Writes forward.onnx and trainable.json, the names; returns how many numbers are trained."""
    model, trainable = make_case(name)
    for _, layer in subspace_layers(model):
        layer.plain_autograd = True
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False  # the fused one is written as the same products, with more around them
    with torch.no_grad():
        for parameter in model.parameters():
            # New biases and norms are equal, and the exporter keeps one of equal tensors, under one name.
            parameter += 1e-3 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, and traces python conditions
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, SIZE, SIZE),),
            place / "forward.onnx",
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=False,  # would transpose weights, and lose their names
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )
    (place / "trainable.json").write_text(json.dumps(trainable))
    return sum(parameter.numel() for key, parameter in model.named_parameters() if key in trainable)
