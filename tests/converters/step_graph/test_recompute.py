"""Blocks that are computed again: the same numbers, in less memory, and a runtime that leaves them alone."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from torch import nn
from training_steps import GraphStep, Scalars, labelled, make_random, node_types, spec_for

from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.recompute import blocks_of
from wasi_export.converters.training_step import ExportedStep, export_training_step
from wasi_export.errors import ConfigError
from wasi_export.runtimes.training_session import step_options

SIZE, CLASSES, DEPTH = 32, 5, 2


def make_vit() -> nn.Module:
    torch.manual_seed(0)
    return make_random(
        timm.create_model("test_vit", img_size=SIZE, patch_size=4, depth=DEPTH, num_classes=CLASSES)
    )


@pytest.fixture(scope="module")
def steps() -> dict[str, ExportedStep]:
    """The same step with each way to recompute, to be read only."""
    model = make_vit()
    names = [name for name, _ in model.named_parameters()]
    return {
        how: export_training_step(model, spec_for(SIZE), names, StepSettings(opt="sgd", recompute=how))
        for how in ("none", "block", "fine")
    }


@pytest.mark.slow
def test_what_is_recomputed_gives_the_same_step(steps: dict[str, ExportedStep]) -> None:
    """The same operators on the same numbers: equal, but for sums of gradients that meet in another order."""
    results, states = {}, {}
    for how, exported in steps.items():
        step = GraphStep(exported)
        results[how] = [
            step.step(images, labels, Scalars(0.1, 0.05, 1.0))[0]
            for images, labels in labelled((4, 1, 7), (3, SIZE, SIZE), CLASSES)
        ]
        states[how] = step.state
    for how in ("block", "fine"):
        np.testing.assert_allclose(results[how], results["none"], atol=1e-6)
        for name, tensor in states[how].items():
            np.testing.assert_allclose(tensor, states["none"][name], atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_graph_holds_what_is_recomputed(steps: dict[str, ExportedStep]) -> None:
    """A block again up to its last product; with `fine`, attention once more for its own gradient."""
    counts = {how: Counter(node_types(exported.step)) for how, exported in steps.items()}
    assert {how: count["Softmax"] for how, count in counts.items()} == {
        "none": DEPTH,
        "block": 2 * DEPTH,
        "fine": 3 * DEPTH,
    }
    assert {how: count["Gelu"] for how, count in counts.items()} == {
        "none": DEPTH,
        "block": 2 * DEPTH,
        "fine": 2 * DEPTH,
    }


def as_run(exported: ExportedStep, folder: Path, options: ort.SessionOptions) -> Counter[str]:
    """Returns the operators that the runtime is left with after its own rewriting."""
    path = folder / "as_run.onnx"
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(exported.step.SerializeToString(), options)
    return Counter(node_types(onnx.load(path)))


@pytest.mark.slow
def test_the_session_of_a_bundle_keeps_what_is_recomputed(
    steps: dict[str, ExportedStep], tmp_path: Path
) -> None:
    found = as_run(steps["block"], tmp_path, step_options(threads=1))
    assert found["Softmax"] == found["Gelu"] == 2 * DEPTH


@pytest.mark.slow
def test_an_optimising_session_would_merge_it(steps: dict[str, ExportedStep], tmp_path: Path) -> None:
    found = as_run(steps["block"], tmp_path, step_options(threads=1, optimise=True))
    assert found["Softmax"] == found["Gelu"] == DEPTH


PEAK = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
from wasi_export.runtimes.session import open_model
from wasi_export.runtimes.training_session import step_options

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder, optimise = Path(sys.argv[1]), sys.argv[2] == "True"
session = open_model(folder / "step.onnx", step_options(threads=1, optimise=optimise))
inputs = load_file(folder / "inputs.safetensors")
before = peak()
session.run(["loss"], inputs)  # keeps no output but the loss, so only the step itself is measured
print(peak() - before)
"""


def peak_kib(exported: ExportedStep, folder: Path, *, optimise: bool) -> int:
    """Returns by how much a step on 64 images lifts the peak of a fresh process that runs nothing else."""
    from safetensors.numpy import save_file

    ((images, labels),) = labelled((64,), (3, SIZE, SIZE), CLASSES)
    scalars = {name: np.array(value, np.float32) for name, value in vars(Scalars(0.1)).items()}
    data = {"images": images.numpy(), "targets": labels.numpy(), **scalars, **exported.parameters}
    (folder / "step.onnx").write_bytes(exported.step.SerializeToString())
    save_file(data, folder / "inputs.safetensors")
    command = [sys.executable, "-c", PEAK, str(folder), str(optimise)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_recomputing_lowers_the_peak_and_an_optimising_session_undoes_that(
    steps: dict[str, ExportedStep], tmp_path: Path
) -> None:
    """Of two blocks 0.67 of the memory is left, of three 0.47; merged, all of it is back."""
    kept = peak_kib(steps["none"], tmp_path, optimise=False)
    recomputed = peak_kib(steps["block"], tmp_path, optimise=False)
    merged = peak_kib(steps["block"], tmp_path, optimise=True)
    assert recomputed < 0.75 * kept, (recomputed, kept)
    assert merged > 1.25 * recomputed, (merged, recomputed)


def test_blocks_are_those_of_the_innermost_lists() -> None:
    model = make_vit()
    assert blocks_of(model) == list(model.blocks)
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2), num_heads=(2, 2))
    assert blocks_of(swin) == [block for layer in swin.layers for block in layer.blocks]


def test_a_model_without_blocks_says_what_to_give() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    with pytest.raises(ConfigError, match='Sequential has no repeated blocks: give recompute = "none"'):
        export_training_step(model, spec_for(4), ["1.weight"], StepSettings())
