"""Masks of scores, in ONNX text: 2 windows, 1 head, 4 tokens, two of which are masked in one window."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from wasi_export.converters.passes.mask import MaskPass

ADDED = "masked = Add (x, mask) p = Softmax <axis = -1> (masked)"
VIEWED = """
    to5 = Constant <value_ints = [1, 2, 1, 4, 4]> ()
    apart = Reshape (x, to5)
    both = Add (mask, apart)
    to4 = Constant <value_ints = [2, 1, 4, 4]> ()
    masked = Reshape (both, to4)
    p = Softmax <axis = -1> (masked)
"""
BIASED = "biased = Add (x, bias) masked = Add (biased, mask) p = Softmax <axis = -1> (masked)"
OPERATOR = "p = Attention <scale = 1.0> (x, x, x, mask)"


def graph(body: str, hidden: float = -100.0, shown: float = 0.0, *, whole_row: bool = False) -> ir.Model:
    mask = [shown] * 16 + [shown, shown, hidden, hidden] * 4
    mask[:4] = [hidden if whole_row else shown] * 4
    axes = "1, 2, 1, 4, 4" if body is VIEWED else "2, 1, 4, 4"
    return ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 23]>
    graph (float[2, 1, 4, 4] x) => (float[2, 1, 4, 4] p)
    <float[{axes}] mask = {{{", ".join(map(str, mask))}}}, float[4, 4] bias = {{{", ".join(["0.5"] * 16)}}}>
    {{ {body} }}""")


def lowered(model: ir.Model) -> ir.Model:
    model = ir.from_proto(ir.to_proto(model))
    MaskPass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def constants(model: ir.Model) -> list[float]:
    """Returns the smallest numbers of all constants of floats, sorted."""
    tensors = [
        *(value.const_value for value in model.graph.initializers.values()),
        *(node.attributes["value"].as_tensor() for node in model.graph if "value" in node.attributes),
    ]
    return sorted(float(t.numpy().min()) for t in tensors if t is not None and t.dtype == ir.DataType.FLOAT)


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 1, 4, 4)).astype(np.float32)
    (p,) = session.run(None, {"x": x})
    return np.asarray(p)


def subnormal(array: np.ndarray) -> int:
    return int(((array != 0) & (np.abs(array) < np.finfo(np.float32).tiny)).sum())


@pytest.mark.parametrize("body", [ADDED, VIEWED, BIASED], ids=["added", "added to windows", "after a bias"])
def test_no_subnormal_number_is_left_and_nothing_else_changes(body: str) -> None:
    model = graph(body)
    after = lowered(model)
    assert subnormal(run(model)) > 0
    assert subnormal(run(after)) == 0
    np.testing.assert_allclose(run(after), run(model), rtol=1e-6, atol=np.finfo(np.float32).tiny)
    assert constants(after)[0] == -1000


def test_both_of_two_masks_are_lowered() -> None:
    after = lowered(graph("one = Add (x, mask) masked = Add (one, mask) p = Softmax <axis = -1> (masked)"))
    assert constants(after)[:2] == [-1000, -1000]


def test_a_mask_of_the_operator_is_lowered() -> None:
    model = graph(OPERATOR)
    assert constants(lowered(model))[0] == -1000
    np.testing.assert_allclose(run(lowered(model)), run(model), rtol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        graph(ADDED, hidden=-80.0),
        graph(ADDED, hidden=-1e4),
        graph(ADDED, hidden=float(np.finfo(np.float32).min)),
        graph(ADDED, shown=0.5),
        graph(ADDED, whole_row=True),
        graph("p = Add (x, mask)"),
        graph("masked = Add (x, mask) s = Softmax <axis = -1> (masked) p = Mul (s, masked)"),
    ],
    ids=[
        "not masked, only small",
        "low enough",
        "as low as can be",
        "a bias with low numbers",
        "nothing but masked",
        "no softmax",
        "used elsewhere as well",
    ],
)
def test_other_numbers_are_left_as_they_are(model: ir.Model) -> None:
    assert constants(lowered(model))[0] == constants(model)[0]
