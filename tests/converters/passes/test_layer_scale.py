import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from wasi_export.converters.passes.layer_scale import LayerScalePass

HEAD = """<ir_version: 10, opset_import: ["" : 23]> graph (float[N, 2] x) => (float[N, 3] y)
<float[3, 2] weight = {1, 2, 3, 4, 5, 6}, float[3] bias = {1, 0, -1}, float[3] gamma = {2, -1, 0.5},
 float[1] scalar = {3}, int64[3] three = {-1, 1, 3}, int64[2] two = {-1, 3}> """
AFTER_ROWS = f"{HEAD} {{ a = Gemm <transB = 1> (x, weight, bias) y = Mul (a, gamma) }}"
FIRST = f"{HEAD} {{ a = Gemm <transB = 1> (x, weight, bias) y = Mul (gamma, a) }}"
NO_BIAS = f"{HEAD} {{ a = Gemm <transB = 1> (x, weight) y = Mul (a, gamma) }}"
RESHAPED = f"""{HEAD} {{
    a = Gemm <transB = 1> (x, weight, bias)
    b = Reshape (a, three)
    c = Mul (b, gamma)
    y = Reshape (c, two)
}}"""
OUTPUT_USED_TWICE = f"{HEAD} {{ a = Gemm <transB = 1> (x, weight, bias) b = Mul (a, gamma) y = Add (a, b) }}"
WEIGHT_USED_TWICE = f"""{HEAD} {{
    a = Gemm <transB = 1> (x, weight, bias)
    b = Mul (a, gamma)
    c = Gemm <transB = 1> (x, weight)
    y = Add (b, c)
}}"""
SCALAR = f"{HEAD} {{ a = Gemm <transB = 1> (x, weight, bias) y = Mul (a, scalar) }}"
NOT_A_LAYER = f"{HEAD} {{ a = Gemm <transB = 1> (x, weight, bias) b = Relu (a) y = Mul (b, gamma) }}"
OTHER_LAYOUT = f"""{HEAD} {{
    w = Transpose <perm = [1, 0]> (weight)
    a = Gemm (x, w, bias)
    y = Mul (a, gamma)
}}"""


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (y,) = session.run(None, {"x": np.array([[1, -2], [3, 0.5]], np.float32)})
    return np.asarray(y)


def fold(text: str) -> tuple[ir.Model, ir.Model, dict[str, str]]:
    before, after = ir.from_onnx_text(text), ir.from_onnx_text(text)
    for model in (before, after):
        ShapeInferencePass()(model)
    scales = LayerScalePass()
    scales(after)
    return before, after, scales.folded


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        (AFTER_ROWS, ["weight", "bias"]),
        (FIRST, ["weight", "bias"]),
        (NO_BIAS, ["weight"]),
        (RESHAPED, ["weight", "bias"]),
    ],
    ids=["after the layer", "as the first operand", "without a bias", "through a reshape"],
)
def test_a_scale_of_channels_becomes_part_of_the_layer(text: str, folded: list[str]) -> None:
    before, after, found = fold(text)
    assert found == dict.fromkeys(folded, "gamma")
    assert "Mul" not in {node.op_type for node in after.graph}
    np.testing.assert_allclose(run(after), run(before), rtol=1e-6)


@pytest.mark.parametrize(
    "text",
    [OUTPUT_USED_TWICE, WEIGHT_USED_TWICE, SCALAR, NOT_A_LAYER, OTHER_LAYOUT],
    ids=["output used twice", "weight used twice", "scalar", "activation between", "weight transposed"],
)
def test_anything_else_is_left_as_it_is(text: str) -> None:
    before, after, found = fold(text)
    assert not found
    assert [node.op_type for node in after.graph] == [node.op_type for node in before.graph]
    np.testing.assert_array_equal(run(after), run(before))
