"""timm's attention as torch writes it, in ONNX text: 5 tokens, 2 heads of 4."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from wasi_export.converters.passes.attention import PackedAttentionPass

SLICED = """
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    qs = Slice (split, zero, one, zero)
    q = Squeeze (qs, zero)
    ks = Slice (split, one, two, zero)
    k = Squeeze (ks, zero)
    vs = Slice (split, two, three, zero)
    v = Squeeze (vs, zero)
"""
GATHERED = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    q = Gather <axis = 0> (split, zero)
    k = Gather <axis = 0> (split, one)
    v = Gather <axis = 0> (split, two)
"""
PLAIN = "attended = Attention (q, k, v)"


def graph(
    taken: str = SLICED, attend: str = PLAIN, heads: str = "2, 0, 3, 1, 4", target: str = "-1, 5, 3, 2, 4"
) -> ir.Model:
    return ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 23]>
    graph (float[B, 5, 24] qkv, float[2, 5, 5] mask) => (float[B, 5, 8] y) {{
        shape = Constant <value_ints = [{target}]> ()
        view = Reshape (qkv, shape)
        split = Transpose <perm = [{heads}]> (view)
        {taken}
        {attend}
        back = Transpose <perm = [0, 2, 1, 3]> (attended)
        merged = Constant <value_ints = [-1, 5, 8]> ()
        y = Reshape (back, merged)
    }}""")


def rewritten(model: ir.Model) -> ir.Model:
    model = ir.from_proto(ir.to_proto(model))
    PackedAttentionPass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


def run(model: ir.Model, *, optimise: bool) -> np.ndarray:
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    inputs = {"qkv": rng.standard_normal((3, 5, 24)), "mask": rng.standard_normal((2, 5, 5))}
    (y,) = session.run(None, {name: value.astype(np.float32) for name, value in inputs.items()})
    return np.asarray(y)


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        graph(),
        graph(GATHERED),
        graph(attend="attended = Attention (q, k, v, mask)"),
        graph(attend="attended = Attention <scale = 0.3> (q, k, v)"),
    ],
    ids=["sliced", "gathered", "with a mask", "with its own scale"],
)
def test_packed_attention_computes_the_same_without_transposes(model: ir.Model, optimise: bool) -> None:
    packed = rewritten(model)
    assert operators(packed) == ["Reshape", "Split", "Attention", "Reshape"]
    np.testing.assert_allclose(run(packed, optimise=optimise), run(model, optimise=optimise), atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        graph(SLICED.replace("Squeeze (qs", "Squeeze (ks")),
        graph(SLICED.replace("q = Squeeze (qs, zero)", "q0 = Squeeze (qs, zero)\n q = Relu (q0)")),
        graph(heads="2, 0, 1, 3, 4"),
        graph(target="5, -1, 3, 2, 4"),
    ],
    ids=["q is k", "q is changed after the split", "tokens before heads", "tokens not static"],
)
def test_what_only_looks_alike_is_left_as_it_is(model: ir.Model) -> None:
    assert "Split" not in operators(rewritten(model))
