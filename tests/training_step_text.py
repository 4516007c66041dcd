"""The training step of the small model of `helpers.py`, written by hand: gradient descent with momentum."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import parser

NAMES = ("left", "right", "bias")
MOMENTS = tuple(f"{name}.momentum_buffer" for name in NAMES)
_SHAPES: Mapping[str, str] = {"left": "2, 2", "right": "2, 48", "bias": "2"}

EVALUATE_TEXT = """
<ir_version: 9, opset_import: ["" : 20]>
evaluate (float[batch, 3, 4, 4] images, float[2, 2] left, float[2, 48] right, float[2] bias)
    => (float[batch, 2] outputs)
{
    flat = Flatten (images)
    code = Gemm <transB = 1> (flat, right)
    outputs = Gemm <transB = 1> (code, left, bias)
}
"""

STEP_TEXT = """
<ir_version: 9, opset_import: ["" : 20]>
step (float[batch, 3, 4, 4] images, int64[batch] targets, float lr, float weight_decay, float clip_norm,
      float[2, 2] left, float[2, 48] right, float[2] bias,
      float[2, 2] left_m, float[2, 48] right_m, float[2] bias_m)
    => (float loss, int64 correct, float gradient_norm,
        float[2, 2] left_next, float[2, 48] right_next, float[2] bias_next,
        float[2, 2] left_m_next, float[2, 48] right_m_next, float[2] bias_m_next)
<int64 two = {2}, float[2] off_on = {0.0, 1.0}, int64[1] rows = {0}, int64[1] columns = {1}, float mu = {0.9},
 float one = {1.0}, float tiny = {1e-6}>
{
    flat = Flatten (images)
    code = Gemm <transB = 1> (flat, right)
    logits = Gemm <transB = 1> (code, left, bias)
    logp = LogSoftmax <axis = 1> (logits)
    onehot = OneHot <axis = 1> (targets, two, off_on)
    likely = Mul (logp, onehot)
    per_image = ReduceSum <keepdims = 0> (likely, columns)
    mean = ReduceMean <keepdims = 0> (per_image, rows)
    loss = Neg (mean)
    best = ArgMax <axis = 1, keepdims = 0> (logits)
    right_ones = Equal (best, targets)
    counted = Cast <to = 7> (right_ones)
    correct = ReduceSum <keepdims = 0> (counted, rows)
    p = Exp (logp)
    wrong = Sub (p, onehot)
    sizes = Shape <start = 0, end = 1> (targets)
    size = Squeeze (sizes)
    count = Cast <to = 1> (size)
    d = Div (wrong, count)
    g_left = Gemm <transA = 1> (d, code)
    d_code = MatMul (d, left)
    g_right = Gemm <transA = 1> (d_code, flat)
    g_bias = ReduceSum <keepdims = 0> (d, rows)
    s1 = ReduceSumSquare <keepdims = 0> (g_left)
    s2 = ReduceSumSquare <keepdims = 0> (g_right)
    s3 = ReduceSumSquare <keepdims = 0> (g_bias)
    square = Sum (s1, s2, s3)
    gradient_norm = Sqrt (square)
    above = Add (gradient_norm, tiny)
    ratio = Div (clip_norm, above)
    share = Min (ratio, one)
UPDATES
}
"""

_UPDATE = """
    {0}_g = Mul (g_{0}, share)
    {0}_decay = Mul ({0}, weight_decay)
    {0}_all = Add ({0}_g, {0}_decay)
    {0}_old = Mul ({0}_m, mu)
    {0}_m_next = Add ({0}_old, {0}_all)
    {0}_change = Mul ({0}_m_next, lr)
    {0}_next = Sub ({0}, {0}_change)
"""


def step_model() -> bytes:
    """Returns the ONNX file of the step; the names have dots, which ONNX text does not take."""
    model = parser.parse_model(STEP_TEXT.replace("UPDATES", "".join(_UPDATE.format(name) for name in NAMES)))
    renamed = {f"{name}_m": f"{name}.momentum_buffer" for name in NAMES}
    renamed |= {f"{old}_next": f"{renamed.get(old, old)}.next" for old in (*NAMES, *renamed)}
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    return model.SerializeToString()


def evaluate_model() -> bytes:
    """Returns the ONNX file of the forward pass."""
    return parser.parse_model(EVALUATE_TEXT).SerializeToString()


def numpy_step(
    state: Mapping[str, NDArray[np.float64]],
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    lr: float,
    weight_decay: float = 0.0,
    clip_norm: float = float("inf"),
) -> tuple[float, dict[str, NDArray[np.float64]]]:
    """Returns the loss and the new state of the same step, in float64."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    code = flat @ state["right"].T
    logits = code @ state["left"].T + state["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    d = p / len(labels)
    gradients = {"left": d.T @ code, "right": (d @ state["left"]).T @ flat, "bias": d.sum(0)}
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    new = {}
    for name, gradient in gradients.items():
        whole = gradient * min(1.0, clip_norm / (norm + 1e-6)) + weight_decay * state[name]
        new[f"{name}.momentum_buffer"] = 0.9 * state[f"{name}.momentum_buffer"] + whole
        new[name] = state[name] - lr * new[f"{name}.momentum_buffer"]
    return float(loss), new
