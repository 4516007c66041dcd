"""One attention of two heads with a projection of two factors, in ONNX text."""

import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from wasi_export.converters.passes.value_projection import RANK_LIMIT, ValueProjectionPass

TOKENS, HEADS, WIDTH, RANK = 64, 2, 32, 4
TEXT = f"""<ir_version: 11, opset_import: ["" : 23]>
graph (float[N, {TOKENS}, {RANK}] x) => (float[M, {WIDTH}] y) {{
    z = Reshape (x, flat)
    qkv = Gemm <transB = 1> (z, qkv_left, qkv_bias)
    packed = Reshape (qkv, tokens)
    q, k, v = Split <axis = -1, num_outputs = 3> (packed)
    a = Attention <q_num_heads = {HEADS}, kv_num_heads = {HEADS}> (q, k, v)
    rows = Reshape (a, wide)
    code = Gemm <transB = 1> (rows, right)
    y = Gemm <transB = 1> (code, left)
}}"""


def make(text: str = TEXT, rank: int = RANK) -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = {
        "qkv_left": [3 * WIDTH, RANK], "qkv_bias": [3 * WIDTH], "right": [rank, WIDTH], "left": [WIDTH, rank],
        "right_bias": [rank],
    }  # fmt: skip
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    values |= {"flat": np.array([-1, RANK]), "wide": np.array([-1, WIDTH])}
    values["tokens"] = np.array([-1, TOKENS, 3 * WIDTH])
    used = set(re.findall(r"\w+", text))
    tensors = [ir.tensor(value, name=name) for name, value in values.items() if name in used]
    model = ir.from_onnx_text(text, tensors)
    ShapeInferencePass()(model)
    return model


def rewritten(model: ir.Model) -> ir.Model:
    ValueProjectionPass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def run(model: ir.Model) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((3, TOKENS, RANK)).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize(
    "text",
    [TEXT, TEXT.replace(", qkv_bias", "")],
    ids=["with a bias", "without"],
)
def test_values_stay_in_the_rank_of_the_projection(text: str) -> None:
    before, after = make(text), rewritten(make(text))
    np.testing.assert_allclose(run(after), run(before), rtol=1e-4, atol=1e-4)
    names = set(after.graph.initializers)
    assert {f"right @ qkv_left[{2 * WIDTH}:]", f"qkv_left[:{2 * WIDTH}]"} <= names
    assert not {"right", "qkv_left"} & names
    value = after.graph.initializers[f"right @ qkv_left[{2 * WIDTH}:]"]
    assert list(value.shape) == [HEADS * RANK, RANK]


@pytest.mark.parametrize("option", ["scale = 1.0", "is_causal = 1", "softcap = 0.5"])
def test_the_attention_keeps_what_it_was_told(option: str) -> None:
    text = TEXT.replace("<q_num", f"<{option}, q_num")
    before, after = make(text), rewritten(make(text))
    np.testing.assert_allclose(run(after), run(before), rtol=1e-4, atol=1e-4)
    assert "right" not in after.graph.initializers
    assert not np.allclose(run(before), run(make()), atol=1e-2)


def test_the_scale_of_the_queries_is_written_out() -> None:
    (attention,) = (node for node in rewritten(make()).graph if node.op_type == "Attention")
    assert attention.attributes.get_float("scale") == pytest.approx((WIDTH / HEADS) ** -0.5)


OTHER_USER = TEXT.replace("y = Gemm", "c = Gemm").replace("(code, left)", "(code, left) y = Add (c, rows)")
CHANGED = TEXT.replace("a = Att", "changed = Relu (v) a = Att").replace("(q, k, v)", "(q, k, changed)")


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        (TEXT, RANK_LIMIT + 1),
        (TEXT, WIDTH),
        (TEXT.replace("(rows, right)", "(rows, right, right_bias)"), RANK),
        (OTHER_USER, RANK),
        (CHANGED, RANK),
    ],
    ids=["rank above the limit", "no fewer products", "a bias between", "heads used otherwise", "v changed"],
)
def test_what_gains_nothing_or_is_another_thing_is_left(text: str, rank: int) -> None:
    before, after = make(text, rank), rewritten(make(text, rank))
    assert [node.op_type for node in after.graph] == [node.op_type for node in before.graph]
    np.testing.assert_array_equal(run(after), run(before))
