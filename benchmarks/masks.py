"""What subnormal numbers cost: Swin with the masks that it comes with, and with lowered ones, in turns.

    python benchmarks/masks.py           # a minute; the table goes into docs/inference.md
    python benchmarks/masks.py --json    # prints the result that is kept

Random weights, one thread, CPU time of the process: an image of 224 px through Swin-T, and a training step of
its first two stages on four. Both graphs of a row are the same but for one number of the masks
(`converters/passes/mask.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import timm
import torch
from inference import OPSET, PAGE, SPEC, make_model, run_in_turns
from inference_tables import processor_of
from kept import new_parser, new_result, read_result, to_json, write_result
from numpy.typing import NDArray
from onnx import numpy_helper
from pages import fill

from wasi_export.converters.inference import export_inference
from wasi_export.converters.passes.mask import HIDDEN
from wasi_export.converters.step_graph.function import SCALARS, StepSettings
from wasi_export.converters.training_step import export_training_step
from wasi_export.runtimes.session import session_options
from wasi_export.views import markdown_table

RESULT = Path("benchmarks/results/masks.json")
MARK, END = "<!-- benchmarks/masks.py -->\n", "<!-- end of masks -->"
SWIN, BATCH, ROUNDS = "swin_tiny_patch4_window7_224", 4, 15
GIVEN = -100

Case = tuple[onnx.ModelProto, dict[str, NDArray[Any]]]
"""A graph, and its inputs."""


def main() -> None:
    """Measures and writes, or prints."""
    if not new_parser(__doc__).parse_args().json:
        rows = [measure("an image", inference()), measure("a training step", training_step())]
        write_result(RESULT, new_result(__doc__, rows=rows))
        fill(PAGE, MARK, END, to_markdown(read_result(RESULT)))
    print(to_json(read_result(RESULT)))


def measure(what: str, case: Case) -> dict[str, Any]:
    """Returns CPU ms of a graph with both masks."""
    graph, inputs = case
    samples = run_in_turns([runner(each, inputs) for each in (with_given_masks(graph), graph)], ROUNDS)
    given, lowered = np.round(samples.T, 3).tolist()
    return {"what": what, "given_ms": given, "lowered_ms": lowered}


def inference() -> Case:
    """Returns the graph of Swin-T, and an image."""
    return export_inference(make_model(SWIN, None), SPEC, opset=OPSET), {SPEC.name: make_images(1)}


def training_step() -> Case:
    """Returns the graph of a training step of two stages, and its inputs."""
    torch.manual_seed(0)
    model = timm.create_model(SWIN, depths=(2, 2), num_heads=(3, 6), num_classes=10).eval()
    names = [name for name, _ in model.named_parameters()]
    exported = export_training_step(model, SPEC, names, StepSettings(opt="sgd", recompute="none"))
    batch = {SPEC.name: make_images(BATCH), "targets": np.arange(BATCH)}
    scalars = {name: np.array(0.01, np.float32) for name in SCALARS}
    return exported.step, {**batch, **scalars, **exported.parameters, **exported.optimizer}


def make_images(count: int) -> NDArray[np.float32]:
    """Returns random images."""
    return np.random.default_rng(0).standard_normal((count, 3, SPEC.height, SPEC.width), np.float32)


def with_given_masks(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the graph with the number that Swin comes with where a mask hides a token."""
    changed = onnx.ModelProto.FromString(graph.SerializeToString())
    constants = [node.attribute[0].t for node in changed.graph.node if node.op_type == "Constant"]
    masks = [
        tensor
        for tensor in (*changed.graph.initializer, *constants)
        if np.any(numpy_helper.to_array(tensor) == HIDDEN)
    ]
    for tensor in masks:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            numpy_helper.from_array(np.where(array == HIDDEN, array.dtype.type(GIVEN), array), tensor.name)
        )
    assert masks
    return changed


def runner(graph: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> Callable[[], object]:
    """Returns what runs a graph once, on one thread."""
    session = ort.InferenceSession(graph.SerializeToString(), session_options(threads=1))
    return lambda: session.run(None, inputs)


def to_markdown(result: dict[str, Any]) -> str:
    """Returns a line for each case."""
    lines = []
    for row in result["rows"]:
        given, lowered = np.array(row["given_ms"]), np.array(row["lowered_ms"])
        ratio = np.median(lowered / given)
        lines.append((row["what"], f"{np.median(given):.0f}", f"{np.median(lowered):.0f}", f"{ratio:.2f}"))
    return markdown_table(
        (f"Swin, {processor_of(result)}", "masks of -100, ms", "of -1000, ms", "ratio"), "lrrr", lines
    )


if __name__ == "__main__":
    main()
