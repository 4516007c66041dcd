"""Blocks of one head in ONNX text, written in the two forms that exports have."""

import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from wasi_export.converters.passes.token_selection import TokenSelectionPass

TOKENS, WIDTH = 5, 4
SHAPES = {
    "one": [WIDTH],
    "qkv": [3 * WIDTH, WIDTH],
    "qkv_bias": [3 * WIDTH],
    "proj": [WIDTH, WIDTH],
    "head": [2, WIDTH],
}
TARGETS = {"rows": [-1, WIDTH], "tokens": [-1, TOKENS, WIDTH], "packed": [-1, TOKENS, 3 * WIDTH]}
HEAD = f"""<ir_version: 10, opset_import: ["" : 23]>
graph (float[N, {TOKENS}, {WIDTH}] x) => (float[M, {{width}}] y) """
BLOCK = """
    r = Reshape (x, rows)
    n = LayerNormalization (r, one)
    z = Gemm <transB = 1> (n, qkv, qkv_bias)
    p = Reshape (z, packed)
    q, k, v = Split <axis = -1, num_outputs = 3> (p)
    {attention}
    ar = Reshape (a, rows)
    o = Gemm <transB = 1> (ar, proj)
    s = Add (r, o)
    m = LayerNormalization (s, one)
    g = Gelu (m)
    t = Reshape (g, tokens)
"""
ATTENTION = "a = Attention <q_num_heads = 1, kv_num_heads = 1> (q, k, v)"
DECOMPOSED = """qs = Mul (q, scale)
    kt = Transpose <perm = [0, 2, 1]> (k)
    qk = MatMul (qs, kt)
    w = Softmax <axis = -1> (qk)
    a = MatMul (w, v)"""
CLASS_TOKEN = "c = Gather <axis = 1> (t, chosen) cr = Reshape (c, rows) y = Gemm <transB = 1> (cr, head)"
SCALAR = "c = Gather <axis = 1> (t, scalar) y = Gemm <transB = 1> (c, head)"
ALL_TOKENS_TOO = (
    "c = Gather <axis = 1> (t, scalar) h = Gelu (t) d = Gather <axis = 1> (h, scalar) y = Add (c, d)"
)


def text_of(tail: str, attention: str = ATTENTION, *, width: int = 2) -> str:
    return HEAD.format(width=width) + "{" + BLOCK.format(attention=attention) + tail + "}"


def make(text: str, chosen: tuple[int, ...] = (0,)) -> ir.Model:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    values |= {name: np.array(target) for name, target in TARGETS.items()}
    values |= {"chosen": np.array(chosen), "scalar": np.array(0), "scale": np.array(0.5, np.float32)}
    used = set(re.findall(r"\w+", text))
    tensors = [ir.tensor(value, name=name) for name, value in values.items() if name in used]
    model = ir.from_onnx_text(text, tensors)
    ShapeInferencePass()(model)
    return model


def narrowed(text: str, chosen: tuple[int, ...] = (0,)) -> ir.Model:
    model = make(text, chosen)
    TokenSelectionPass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def run(model: ir.Model, names: list[str] | None = None) -> list[np.ndarray]:
    x = np.random.default_rng(1).standard_normal((3, TOKENS, WIDTH)).astype(np.float32)
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString())
    return [np.asarray(y) for y in session.run(names, {"x": x})]


def rows_of(model: ir.Model, op_type: str) -> list[int]:
    """Returns how many rows each node of a kind gives for 3 images, in order."""
    copy = ir.from_proto(ir.to_proto(model))
    nodes = [node for node in copy.graph if node.op_type == op_type]
    copy.graph.outputs.extend(node.outputs[0] for node in nodes)
    for node in nodes:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return [len(y.reshape(-1, y.shape[-1])) for y in run(copy)[1:]]


@pytest.mark.parametrize("tail", [CLASS_TOKEN, SCALAR], ids=["one of a list", "a scalar index"])
@pytest.mark.parametrize("attention", [ATTENTION, DECOMPOSED], ids=["operator", "written out"])
def test_what_follows_the_last_mixing_is_computed_for_the_token_alone(tail: str, attention: str) -> None:
    text = text_of(tail, attention)
    after = narrowed(text)
    np.testing.assert_allclose(run(after)[0], run(make(text))[0], rtol=1e-5, atol=1e-6)
    assert rows_of(after, "Gelu") == [3]
    assert sorted(rows_of(after, "LayerNormalization")) == [3, 3 * TOKENS]
    # The head, proj and the Linear of q see one token of each image, that of k and v all.
    assert sorted(rows_of(after, "Gemm")) == [3, 3, 3, 3 * TOKENS]
    assert {"qkv[:4]", "qkv[4:]", "qkv_bias[:4]", "qkv_bias[4:]"} <= set(after.graph.initializers)


def test_a_causal_attention_sees_the_places_of_all_queries() -> None:
    text, chosen = text_of(CLASS_TOKEN, ATTENTION.replace("<q_num", "<is_causal = 1, q_num")), (2,)
    after = narrowed(text, chosen)
    np.testing.assert_allclose(run(after)[0], run(make(text, chosen))[0], rtol=1e-5, atol=1e-6)
    # What follows the attention sees one token of each image, what goes into it all.
    assert rows_of(after, "Gelu") == [3]
    assert rows_of(after, "Attention") == [3 * TOKENS]


def test_several_tokens_are_chosen_together() -> None:
    text, chosen = text_of(CLASS_TOKEN), (-1, 2)
    after = narrowed(text, chosen)
    np.testing.assert_allclose(run(after)[0], run(make(text, chosen))[0], rtol=1e-5, atol=1e-6)
    assert rows_of(after, "Gelu") == [6]


@pytest.mark.parametrize(
    "text",
    [
        text_of(ALL_TOKENS_TOO, width=WIDTH),
        text_of(SCALAR).replace("g = Gelu (m)", "g = CumSum (m, scalar)"),
    ],
    ids=["all tokens are read as well", "an operator that is not known"],
)
def test_what_is_read_or_mixed_otherwise_stays_whole(text: str) -> None:
    after = narrowed(text)
    np.testing.assert_array_equal(run(after)[0], run(make(text))[0])
    assert rows_of(after, "Gemm")[0] == 3 * TOKENS
