"""How a value comes from others, token by token: what the operators of a transformer do to one token."""

from dataclasses import dataclass

import onnx_ir as ir

from wasi_export.converters.passes.values import count, sizes

UNARY = frozenset({"Gelu", "Erf", "Sigmoid", "Tanh", "Relu", "Sqrt", "Neg"})
BINARY = frozenset({"Add", "Sub", "Mul", "Div"})
ALONG_AXIS = {"LayerNormalization": -1, "RMSNormalization": -1, "Softmax": -1, "Split": 0}
"""Operators that work along one axis, and the axis where none is given."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a value are."""

    axis: int
    merged: bool = False
    """Whether the axis is 0 and has the tokens of the whole batch, [B·N, …]."""


@dataclass(frozen=True)
class Step:
    """The node that gives a value, and of which inputs the same tokens are needed."""

    node: ir.Node
    chosen: dict[int, Layout]
    """Inputs of which the same tokens are needed."""
    whole: tuple[int, ...] = ()
    """Inputs of which all tokens are. What is in neither is the same for all tokens."""


def step_to(value: ir.Value, layout: Layout, tokens: int) -> Step | None:
    """Returns how each token of a value comes about; None where that is not known.

    Args:
        value: of known rank.
        layout: where its tokens are.
        tokens: N, of an image.
    """
    node, shape = value.producer(), sizes(value)
    if node is None or node.domain or not shape:
        return None
    axis, last, op = layout.axis, len(shape) - 1, node.op_type
    if op in UNARY:
        return Step(node, {0: layout})
    if op in ALONG_AXIS:
        along = node.attributes.get_int("axis", ALONG_AXIS[op]) % len(shape)
        return Step(node, {0: layout}) if along == last != axis else None
    if op in BINARY:
        own = [i for i, source in enumerate(node.inputs) if _has_tokens(sizes(source), len(shape), axis)]
        return Step(node, dict.fromkeys(own, layout))
    if op == "Concat":
        along = node.attributes.get_int("axis", 0) % len(shape)
        return Step(node, dict.fromkeys(range(len(node.inputs)), layout)) if along != axis else None
    if op == "Gemm":
        plain = layout.merged and not node.attributes.get_int("transA", 0)
        return Step(node, {0: layout}, (1,)) if plain else None
    if op == "MatMul":
        index = 1 if axis == last else 0
        alike = len(sizes(node.inputs[index])) == len(shape)
        return Step(node, {index: layout}, (1 - index,)) if alike else None
    if op == "Attention" and len(node.inputs) == 3:
        # A causal mask goes by the place of a query among all, which a chosen one loses.
        mixed = axis == last - 1 and not node.attributes.get_int("is_causal", 0)
        return Step(node, {0: layout}, (1, 2)) if mixed else None
    if op == "Transpose" and not layout.merged:
        return Step(node, {0: Layout(list(node.attributes.get_ints("perm", ()))[axis])})
    return _reshape_step(node, shape, layout, tokens) if op == "Reshape" else None


def _reshape_step(node: ir.Node, shape: list[int], layout: Layout, tokens: int) -> Step | None:
    """Returns the step of a Reshape that leaves the numbers of a token side by side."""
    source = sizes(node.inputs[0])
    numbers = count(shape[layout.axis + 1 :])
    if not source or numbers is None or not (layout.merged or layout.axis == 1):
        return None
    if source[1:2] == [tokens] and count(source[2:]) == numbers:
        return Step(node, {0: Layout(1)})
    return Step(node, {0: Layout(0, merged=True)}) if count(source[1:]) == numbers else None


def _has_tokens(operand: list[int], rank: int, axis: int) -> bool:
    """Returns whether an operand of a value of this rank is not broadcast over the tokens."""
    own = axis - (rank - len(operand))
    return own >= 0 and operand[own] != 1
