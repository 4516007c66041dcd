"""The models of `benchmarks/step_graph.py`: what is trained of them, and their graphs."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file
from step_plans import make_plan
from torch import nn

from wasi_export.config import AdaptConfig, ModelConfig, Recompute
from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.trainable import trainable_names
from wasi_export.converters.training_step import export_training_step
from wasi_export.manifest import PARAMETERS, STEP, InputSpec, TrainingGraph
from wasi_export.subspace.inject import install_layers, subspace_layers
from wasi_export.training.models import create_model

MODEL, SIZE, CLASSES = "vit_tiny_patch16_224", 224, 10
RECOMPUTE: Mapping[str, Recompute] = {"onnxruntime": "none", "onnxruntime, recompute": "block"}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    what: str
    trainable: str
    fraction: float | None = None


CASES: Mapping[str, Case] = {
    "dense": Case("all of a dense model", "all"),
    "last2": Case("last 2 blocks of it", "blocks:2"),
    "factors": Case("factors, f = 0.2", "factors", 0.2),
}


def make_case(name: str) -> tuple[nn.Module, list[str]]:
    """Returns the model of a case with random weights, and the names of what is trained."""
    torch.manual_seed(0)
    case, model = CASES[name], create_model(ModelConfig(name=MODEL, img_size=SIZE), CLASSES)
    if case.fraction is not None:
        install_layers(model, make_plan(MODEL, case.fraction, mode="none", size=SIZE))
        for _, layer in subspace_layers(model):
            layer.reset_parameters()
    return model.eval(), trainable_names(model, case.trainable)


def write_case(name: str, folder: Path) -> dict[str, Any]:
    """Writes the graphs of a case, one folder for each way; returns facts of them."""
    facts = {}
    for way, recompute in RECOMPUTE.items():
        model, trainable = make_case(name)
        spec = InputSpec(height=SIZE, width=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
        start = time.process_time()
        graphs = export_training_step(
            model, spec, trainable, StepSettings(opt="momentum", recompute=recompute)
        )
        seconds = time.process_time() - start
        place = folder / f"{name} {way}"
        (place / "train").mkdir(parents=True)
        (place / STEP).write_bytes(graphs.step.SerializeToString())
        save_file(graphs.parameters, place / PARAMETERS)
        training = TrainingGraph(
            settings=AdaptConfig(opt="momentum", recompute=recompute),
            parameters=tuple(graphs.parameters),
            optimizer=tuple(graphs.optimizer),
            frozen=(),
            model_parameters=0,
            parity_error=0.0,
        )
        (place / "training.json").write_text(training.model_dump_json())
        facts[way] = {
            "nodes": len(graphs.step.graph.node),
            "mb": (place / STEP).stat().st_size / 1e6,
            "trained": sum(tensor.size for tensor in graphs.parameters.values()),
            "export_s": seconds,
        }
    return json.loads(json.dumps(facts))
