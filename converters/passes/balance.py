"""Factors of equal weight: what is between them is spread evenly over its numbers.

    left·right = (left·D⁻¹)·(D·right)        D diagonal, K×K

`left` is orthonormal, so the numbers of the code z = right·x are as unequal as the singular values, and one
scale for all of them, as of a quantised activation, serves only the largest. With D = (‖left_k‖/‖right_k‖)^½
both sides have the same norm for each k. Exact up to rounding.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from wasi_export.converters.passes.values import is_own_parameter, sizes


class BalancePass(ir.passes.InPlacePass):
    """Balances every pair of factors, in place. A code that goes anywhere but into Linears is left."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the weights of every pair."""
        modified = False
        for node in model.graph:
            if node.op_type == "Gemm" and len(node.inputs) == 2 and is_own_parameter(node.inputs[1]):
                lefts = list(_weights_after(node.outputs[0], sizes(node.inputs[1])[0]))
                if lefts and None not in lefts:
                    _balance(node.inputs[1], lefts)
                    modified = True
        return ir.passes.PassResult(model, modified)


def _weights_after(code: ir.Value, rank: int) -> Iterator[ir.Value | None]:
    """Yields the weights that a code is multiplied by; None for any other use."""
    for use in code.uses():
        node = use.node
        passes_on = node.op_type == "Reshape" or (
            node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 1
        )
        if passes_on and use.idx == 0 and sizes(node.outputs[0])[-1:] == [rank]:
            yield from _weights_after(node.outputs[0], rank)
        elif node.op_type == "Gemm" and use.idx == 0 and node.attributes.get_int("transB", 0) == 1:
            yield node.inputs[1] if is_own_parameter(node.inputs[1]) else None
        else:
            yield None


def _balance(right: ir.Value | None, lefts: list[ir.Value | None]) -> None:
    """Scales the rows of `right` and the columns of all that comes after it."""
    assert right is not None
    assert right.const_value is not None
    rows, columns = right.const_value.numpy(), []
    for left in lefts:
        assert left is not None
        assert left.const_value is not None
        columns.append(left.const_value.numpy())
    before, after = np.linalg.norm(rows, axis=1), np.linalg.norm(np.concatenate(columns), axis=0)
    used = (before > 0) & (after > 0)
    scale = np.ones_like(before)
    scale[used] = np.sqrt(after[used] / before[used])
    right.const_value = ir.tensor((rows.T * scale).T, name=right.name)
    for left, column in zip(lefts, columns, strict=True):
        assert left is not None
        left.const_value = ir.tensor(column / scale, name=left.name)
