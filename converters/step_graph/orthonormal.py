"""An orthonormal basis of the columns of a matrix, in standard operators: Gram-Schmidt, twice, in one Loop.

With the columns v₁ … v_r of A (d×r) one after the other, and Q the rows that are there (zeros at first):

    v ← v / ‖v‖
    v ← v - Qᵀ·(Q·v),  v ← v / ‖v‖        twice
    Q ← Q with the row v

Once is not enough: what a column has outside the others is then off by the condition of A. Twice leaves an
error of the rounding alone, up to a condition of 10⁷ in fp32, and costs two products of r·d a column more.
A column that the others span, or of zeros, leaves nothing; an axis takes its place, so that the result is a
basis and a direction that was lost can come back. The columns point along those of A: the diagonal of R is
positive, as `subspace.tucker.orthonormalize` has it, which is what the operator computes in torch.

Source: Giraud, Langou and Rozložník, "On the round-off error analysis of the Gram-Schmidt algorithm with
reorthogonalization", 2005: twice is enough.
"""

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor, fx

from wasi_export.converters.graph_builder import GraphBuilder
from wasi_export.converters.step_graph.lowering import Lowering, lowers, size_of
from wasi_export.subspace import tucker

TINY = 1e-18
"""A norm below it is one of nothing: the square is at the end of fp32."""


@torch.library.custom_op("wasi_export::orthonormalize", mutates_args=())
def orthonormalize(matrix: Tensor) -> Tensor:
    """Returns an orthonormal basis [d, r] of the columns of a matrix [d, r], d ≥ r.

    One operator in a trace: what it does is written by this file.
    """
    return tucker.orthonormalize(matrix)


@orthonormalize.register_fake
def _(matrix: Tensor) -> Tensor:
    return matrix.new_empty(matrix.shape)


@lowers(torch.ops.wasi_export.orthonormalize.default)
def _orthonormalize(w: Lowering, node: fx.Node, matrix: fx.Node) -> ir.Value:
    d, r = (int(size) for size in size_of(matrix))
    return write_orthonormalize(w.builder, w[matrix], d, r)


def write_orthonormalize(builder: GraphBuilder, matrix: ir.Value, d: int, r: int) -> ir.Value:
    """Returns the basis [d, r] of a matrix [d, r]; the rows of the loop are its columns."""
    columns = builder.transpose(matrix, 1, 0)
    nothing = builder.op("Expand", builder.constant(0.0), builder.constant(np.array([r, d], np.int64)))
    body = _body(builder, columns, d, r)
    trips = builder.constant(np.array(r, np.int64))
    (rows,) = builder.op_multi_out("Loop", [trips, None, nothing], outputs=1, body=body)
    return builder.transpose(rows, 1, 0)


def _body(builder: GraphBuilder, columns: ir.Value, d: int, r: int) -> ir.Graph:
    """Returns the graph that adds a row to those that are there. Constants are of the graph around it."""
    step = ir.Value(name="step", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    more = ir.Value(name="more", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    rows = ir.Value(name="rows", shape=ir.Shape([r, d]), type=ir.TensorType(ir.DataType.FLOAT))
    body = ir.Graph([step, more, rows], [], nodes=[], opset_imports={"": builder.opset}, name="gram_schmidt")
    op = Tape(body).op
    tiny = builder.constant(TINY)

    def unit(v: ir.Value, otherwise: ir.Value | None = None) -> ir.Value:
        norm = op("ReduceL2", [v], {"keepdims": 1})
        scaled = op("Div", [v, op("Max", [norm, tiny])])
        # What is not a number stays what it is: the next loss tells.
        return scaled if otherwise is None else op("Where", [op("Less", [norm, tiny]), otherwise, scaled])

    def without_rows(v: ir.Value) -> ir.Value:
        return op("Sub", [v, op("Gemm", [op("Gemm", [v, rows], {"transB": 1}), rows])])

    index = op("Reshape", [step, builder.constant(np.array([1], np.int64))])
    off_on = builder.constant(np.array([0, 1], np.float32))
    axis = op("OneHot", [index, builder.constant(np.array([d], np.int64)), off_on])
    v = unit(op("Gather", [columns, index], {"axis": 0}))
    v = unit(without_rows(v), otherwise=axis)
    v = unit(without_rows(v))
    result = op("ScatterND", [rows, op("Reshape", [step, builder.constant(np.array([1, 1], np.int64))]), v])
    again = op("Identity", [more])
    for output, like in ((again, more), (result, rows)):
        output.shape, output.type = like.shape, like.type
    body.outputs.extend([again, result])
    # onnxruntime takes a name that is both in a body and around it for one value.
    for number, node in enumerate(body):
        node.name = f"{columns.name}.node_{number}"
    for number, value in enumerate([*body.inputs, *(output for node in body for output in node.outputs)]):
        value.name = f"{columns.name}.{number}"
    return body
