"""How long each Linear layer takes inside its model, dense beside low-rank, by the profiler of onnxruntime.

A node counts for the layer whose weights it multiplies with: `blocks.0.mlp.fc1.right` is of
`blocks.0.mlp.fc1`, and so is a product of weights whose name begins with it. What is left, attention, norms
and activations, is the rest. The clock is the wall's, in whole microseconds, and the profiler itself takes
some time for each node: the sum of all is above the latency.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wasi_export.progress import Track, silent
from wasi_export.report import LayerTime
from wasi_export.runtimes.session import Session
from wasi_export.untrusted.onnx_messages import OnnxModel

ROUNDS, WARMUP = 12, 2
PRODUCTS = frozenset({"Gemm", "MatMul", "Conv"})
ALIASES = ("{node}", "fused {node}", "{node}/MatMulAddFusion", "{output}_nchwc")
REST = ""
_LAYER = re.compile(r"(\S+)\.(?:weight|left|right)\b")
_KERNEL = "_kernel_time"


def compare_layers(
    baseline: Path, bundle: Path, *, threads: int = 1, rounds: int = ROUNDS, track: Track = silent
) -> tuple[LayerTime, ...]:
    """Returns the times of the layers of two models, run in turns on one image, and of the rest of each.

    Raises:
        UsageError: a model has no fixed image size.
        ModelFailedError: a model does not load, or fails.
    """
    before, now = measure_layers((baseline, bundle), threads=threads, rounds=rounds, track=track)
    names = [*(name for name in dict.fromkeys((*before, *now)) if name != REST), REST]
    return tuple(
        LayerTime(layer=name, baseline_ms=before.get(name), bundle_ms=now.get(name)) for name in names
    )


def measure_layers(
    models: Sequence[Path], *, threads: int = 1, rounds: int = ROUNDS, track: Track = silent
) -> tuple[dict[str, float], ...]:
    """Returns for each model the ms of its layers in the order in which they run, and of the rest.

    The mean of the middle half of the rounds, in which the models run in turns.

    Raises:
        UsageError: a model has no fixed image size.
        ModelFailedError: a model does not load, or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions = [
            Session.open(path, threads=threads, profile=Path(folder) / f"{index}")
            for index, path in enumerate(models)
        ]
        images = [session.random_images(1) for session in sessions]
        for _ in track(range(WARMUP + rounds), "layers", WARMUP + rounds):
            for session, image in zip(sessions, images, strict=True):
                session.run(image)
        profiles = [session.end_profile() for session in sessions]
        return tuple(_layer_ms(path, file) for path, file in zip(models, profiles, strict=True))


def _layer_ms(model: Path, profile: Path) -> dict[str, float]:
    """Returns the ms of the layers of a model, from the file that the profiler wrote."""
    layers = layers_of_nodes(model)
    rounds: list[defaultdict[str, float]] = [defaultdict(float)]
    for event in json.loads(profile.read_bytes()):
        if event["name"] == "model_run":  # told after the nodes that it ran
            rounds.append(defaultdict(float))
        elif event["name"].endswith(_KERNEL):
            node = event["name"].removesuffix(_KERNEL)
            rounds[-1][layers.get(node, REST)] += event["dur"] / 1000
    counted = rounds[WARMUP:-1]
    return {name: _middle([round_[name] for round_ in counted]) for name in counted[0]}


def layers_of_nodes(model: Path) -> Mapping[str, str]:
    """Returns the layer of each node that multiplies with a layer's weights, by its names in the profile.

    The runtime runs some nodes under another name: those that take in an activation or a bias, and
    convolutions in blocks of channels.
    """
    graph = OnnxModel.FromString(model.read_bytes()).graph
    weights = {tensor.name: found[1] for tensor in graph.initializer if (found := _LAYER.match(tensor.name))}
    return {
        alias: weights[weight]
        for node in graph.node
        if node.op_type in PRODUCTS
        for weight in node.input
        if weight in weights
        for alias in (name.format(node=node.name, output=node.output[0]) for name in ALIASES)
    }


def _middle(samples: Sequence[float]) -> float:
    """Returns the mean of the samples without the lowest and the highest quarter."""
    quarter = len(samples) // 4
    return float(np.mean(sorted(samples)[quarter : len(samples) - quarter]))
