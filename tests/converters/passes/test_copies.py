"""Nodes that only copy, in ONNX text."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from wasi_export.converters.passes.copies import CopyPass

HEAD = '<ir_version: 10, opset_import: ["" : 23]> graph (float[N, 3, 4] x) => '
SLICE = """s = Constant <value_ints = [{0}]> () e = Constant <value_ints = [{1}]> ()
    a = Constant <value_ints = [{2}]> () t = Constant <value_ints = [{3}]> () part = Slice (x, s, e, a, t)"""
PAD = "pads = Constant <value_ints = [{0}]> () part = Pad (x, pads)"


def graph(body: str, shape: str = "N, 3, 4") -> ir.Model:
    model = ir.from_onnx_text(f"{HEAD} (float[{shape}] y) {{ {body} y = Relu (part) }}")
    return ShapeInferencePass()(model).model


def test_an_axis_of_no_known_size_is_cut() -> None:
    model = graph(SLICE.format(0, 1, 0, 1), "M, 3, 4")
    for value in (model.graph.inputs[0], model.graph[4].outputs[0]):
        value.shape = ir.Shape([None, 3, 4])
    assert model.graph[4].op_type == "Slice"
    CopyPass()(model)
    assert model.graph[4].op_type == "Slice"


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (graph(SLICE.format(0, 3, 1, 1)), 0),
        (graph(SLICE.format("0, 0", "9, 4", "1, 2", "1, 1")), 0),
        (graph(PAD.format("0, 0, 0, 0, 0, 0")), 0),
        (graph(SLICE.format(0, 2, 1, 1), "N, 2, 4"), 1),
        (graph(SLICE.format(-1, -9, 1, -1)), 1),
        (graph(SLICE.format(0, 1, 0, 1), "M, 3, 4"), 1),
        (graph(PAD.format("0, 1, 0, 0, -1, 0")), 1),
        (graph(PAD.format("0, 0, 0, 0, 0, 1"), "N, 3, 5"), 1),
    ],
    ids=[
        "all of an axis",
        "all of two axes, past the end",
        "padded by nothing",
        "a part",
        "backwards",
        "one image of the batch",
        "moved by padding",
        "padded",
    ],
)
def test_only_what_copies_goes(model: ir.Model, left: int) -> None:
    expected = run(model)
    CopyPass()(model)
    assert sum(node.op_type in ("Slice", "Pad") for node in model.graph) == left
    np.testing.assert_array_equal(run(model), expected)
