import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from wasi_export.converters.passes.reshape import ReshapePass

HEAD = '<ir_version: 10, opset_import: ["" : 23]> graph (float[N, 2, 6] x) => '


def simplified(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    ReshapePass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


COMPUTED = f"""{HEAD} (float[N, 12] y) {{
    batch = Shape <start = 0, end = 1> (x)
    twelve = Constant <value_ints = [12]> ()
    target = Concat <axis = 0> (batch, twelve)
    y = Reshape (x, target)
}}"""
CHAIN = f"""{HEAD} (float[N, 2, 6] y) {{
    a = Constant <value_ints = [-1, 4]> ()
    flat = Reshape (x, a)
    b = Constant <value_ints = [-1, 2, 6]> ()
    back = Reshape (flat, b)
    y = Relu (back)
}}"""
COPIED_SIZE = f"""{HEAD} (float[M, 4] y) {{
    a = Constant <value_ints = [-1, 4]> ()
    flat = Reshape (x, a)
    b = Constant <value_ints = [0, 4]> ()
    y = Reshape (flat, b)
}}"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [(COMPUTED, ["Reshape"]), (CHAIN, ["Relu"]), (COPIED_SIZE, ["Reshape", "Reshape"])],
    ids=["a computed target is made constant", "a chain that ends where it began goes", "a zero is kept"],
)
def test_simplifies_and_computes_the_same(text: str, expected: list[str]) -> None:
    x = np.arange(36, dtype=np.float32).reshape(3, 2, 6) - 17
    before, after = ir.from_onnx_text(text), simplified(text)
    assert operators(after) == expected
    np.testing.assert_array_equal(run(after, x), run(before, x))


def test_a_target_with_two_unknown_sizes_stays_computed() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]> graph (float[N, M, 6] x) => (float[N, M, 2, 3] y) {
        lead = Shape <start = 0, end = 2> (x)
        rest = Constant <value_ints = [2, 3]> ()
        target = Concat <axis = 0> (lead, rest)
        y = Reshape (x, target)
    }"""
    assert operators(simplified(text)) == ["Shape", "Concat", "Reshape"]
