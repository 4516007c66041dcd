import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from wasi_export.converters.passes.balance import BalancePass

HEAD = '<ir_version: 10, opset_import: ["" : 23]> graph (float[N, 6] x) => (float[M, 4] y) '
PAIR = f"""{HEAD} {{
    z = Gemm <transB = 1> (x, right)
    y = Gemm <transB = 1> (z, left, bias)
}}"""
CUT = f"""{HEAD} {{
    z = Gemm <transB = 1> (x, right)
    tokens = Reshape (z, three)
    first = Gather <axis = 1> (tokens, chosen)
    rows = Reshape (first, two)
    a = Gemm <transB = 1> (rows, left, bias)
    b = Gemm <transB = 1> (z, other)
    c = ReduceMean <keepdims = 1> (b, axes)
    y = Add (a, c)
}}"""
ACTIVATION = PAIR.replace("y = Gemm", "r = Relu (z) y = Gemm").replace("(z, left", "(r, left")


def make(text: str) -> ir.Model:
    rng = np.random.default_rng(0)
    right = rng.standard_normal((3, 6)) * np.array([[100], [1], [0.01]])
    values = {
        "right": right.astype(np.float32),
        "left": np.linalg.qr(rng.standard_normal((4, 3)))[0].astype(np.float32),
        "other": rng.standard_normal((4, 3)).astype(np.float32),
        "bias": rng.standard_normal(4).astype(np.float32),
        "three": np.array([-1, 2, 3]),
        "two": np.array([-1, 3]),
        "chosen": np.array([1]),
        "axes": np.array([0]),
    }
    tensors = [ir.tensor(value, name=name) for name, value in values.items() if name in text]
    model = ir.from_onnx_text(text, tensors)
    ShapeInferencePass()(model)
    return model


def run(model: ir.Model) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((8, 6)).astype(np.float32)
    (y,) = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"x": x})
    return np.asarray(y)


def value_of(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("text", [PAIR, CUT], ids=["a pair", "one right and two lefts"])
def test_both_sides_of_a_code_have_the_same_norms(text: str) -> None:
    before, after = make(text), make(text)
    assert BalancePass()(after).modified
    np.testing.assert_allclose(run(after), run(before), rtol=2e-5, atol=2e-4)
    lefts = np.concatenate([value_of(after, name) for name in ("left", "other") if name in text])
    np.testing.assert_allclose(
        np.linalg.norm(value_of(after, "right"), axis=1), np.linalg.norm(lefts, axis=0), rtol=1e-5
    )


def test_a_code_that_is_used_otherwise_is_left() -> None:
    model = make(ACTIVATION)
    assert not BalancePass()(model).modified
