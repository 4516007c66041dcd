"""Attention written out, in ONNX text: 2 heads of 4, 5 queries, 6 keys, values of 3."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from wasi_export.converters.passes.explicit_attention import ExplicitAttentionPass

INPUTS = {
    "q": (6, 2, 5, 4),
    "k": (6, 2, 6, 4),
    "v": (6, 2, 6, 3),
    "bias": (1, 2, 5, 6),
    "rows": (5, 6),
    "heads": (2, 5, 6),
    "each": (6, 2, 5, 6),
    "images": (3, 1),
}
PLAIN = "kt = Transpose <perm = [0, 1, 3, 2]> (k)  s = MatMul (q, kt)"
SOFTMAX = "p = Softmax <axis = -1> (s)  z = MatMul (p, v)"
HALF = "half = Constant <value_float = 0.5> ()"
BIAS = PLAIN.replace("s =", "t =") + " s = Add (t, bias)"
WINDOWS = f"""
    {PLAIN.replace("s =", "t =")}
    biased = Add (t, bias)
    to5 = Constant <value_ints = [-1, 2, 2, 5, 6]> ()
    apart = Reshape (biased, to5)
    masked = Add (apart, mask)
    to4 = Constant <value_ints = [-1, 2, 5, 6]> ()
    s = Reshape (masked, to4)
"""
MASK = ", ".join(["0"] * 30 + ["0", "0", "0", "-1000", "-1000", "-1000"] * 5)


def graph(scores: str = PLAIN, attend: str = SOFTMAX, opset: int = 23, batch_q: str = "B") -> ir.Model:
    return ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    graph (float[N, 1] images, float[{batch_q}, 2, 5, 4] q, float[B, 2, 6, 4] k, float[B, 2, 6, 3] v,
           float[1, 2, 5, 6] bias, float[5, 6] rows, float[2, 5, 6] heads, float[B, 2, 5, 6] each)
        => (float[M, 2, 5, 3] y)
    <float[2, 1, 1] of_heads = {{0.5, 2.0}}, float[1, 2, 1, 5, 6] mask = {{{MASK}}}>
    {{
        {scores} {attend} y = Neg (z)
    }}""")


def rewritten(model: ir.Model) -> ir.Model:
    model = ShapeInferencePass()(ir.from_proto(ir.to_proto(model))).model
    for node in model.graph:
        if node.outputs[0].name == "apart":  # torch names the batch of images here
            node.outputs[0].shape = ir.Shape(["N", 2, 2, 5, 6])
    ExplicitAttentionPass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type not in ("Constant", "Neg")]


def run(model: ir.Model, **shapes: tuple[int, ...]) -> np.ndarray:
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in (INPUTS | shapes).items()
    }
    (y,) = session.run(None, inputs)
    return np.asarray(y)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (PLAIN, ["Attention"]),
        (f"{HALF} small = Mul (q, half) {PLAIN.replace('q, kt', 'small, kt')}", ["Attention"]),
        (f"{HALF} {PLAIN.replace('s =', 't =')} s = Mul (t, half)", ["Attention"]),
        (f"{PLAIN.replace('s =', 't =')} s = Mul (t, of_heads)", ["Mul", "Attention"]),
        (f"small = Mul (q, of_heads) {PLAIN.replace('q, kt', 'small, kt')}", ["Mul", "Attention"]),
        (BIAS, ["Attention"]),
        (BIAS.replace("bias", "rows"), ["Attention"]),
        (BIAS.replace("bias", "heads"), ["Attention"]),
        (
            WINDOWS,
            ["Reshape", "Add", "Shape", "Concat", "Expand", "Reshape", "Attention"],
        ),
    ],
    ids=[
        "plain",
        "queries scaled",
        "scores scaled",
        "scores scaled by head",
        "queries scaled by head",
        "a bias",
        "a bias of all heads",
        "a bias of three axes",
        "shifted windows",
    ],
)
def test_becomes_one_operator_that_computes_the_same(scores: str, expected: list[str]) -> None:
    model = graph(scores)
    after = rewritten(model)
    assert operators(after) == expected
    np.testing.assert_allclose(run(after), run(model), atol=1e-6)


def test_keys_that_are_laid_out_for_the_product_are_turned() -> None:
    scores = PLAIN.replace("[0, 1, 3, 2]> (k)", "[0, 2, 3, 1]> (turned)")
    scores = f"turned = Transpose <perm = [0, 2, 1, 3]> (k) {scores}"
    model = graph(scores)
    after = rewritten(model)
    assert operators(after) == ["Transpose", "Transpose", "Attention"]
    np.testing.assert_allclose(run(after), run(model), atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        graph(opset=22),
        graph(attend=SOFTMAX.replace("-1", "2")),
        graph(BIAS.replace("bias", "each")),
        graph(f"{HALF} {BIAS.replace('s =', 'u =')} s = Mul (u, half)"),
        graph(f"minus = Constant <value_float = -1.0> () {PLAIN.replace('s =', 't =')} s = Mul (t, minus)"),
        graph(attend="p = Softmax <axis = -1> (s) twice = Add (p, p) z = MatMul (twice, v)"),
        graph(attend="p = Softmax <axis = -1> (s) w = MatMul (p, v) o = ReduceMax (s) z = Add (w, o)"),
        graph(WINDOWS.replace("biased = Add (t, bias)", "biased = Add (t, rows)")),
    ],
    ids=[
        "an older opset",
        "a softmax over queries",
        "a bias of each image",
        "a scale behind the bias",
        "a scale below zero",
        "a softmax that is changed",
        "scores that are used twice",
        "a mask of windows with a bias of two axes",
    ],
)
def test_what_only_looks_alike_is_left_as_it_is(model: ir.Model) -> None:
    assert "Attention" not in operators(rewritten(model))


def test_one_query_for_all_images_is_left_as_it_is() -> None:
    assert "Attention" not in operators(rewritten(graph(batch_q="1")))
