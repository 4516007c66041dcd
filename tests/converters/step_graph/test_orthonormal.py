import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes import common
from torch import nn

from wasi_export.converters.graph_builder import GraphBuilder
from wasi_export.converters.step_graph.orthonormal import orthonormalize, write_orthonormalize
from wasi_export.subspace import tucker

# In fp32 a column is orthogonal to those before it to the rounding of a dot product of 200 numbers,
# √200·6e-8, and then some, whatever the condition is.
ORTHOGONAL = 2e-6


def matrix_of_condition(rows, columns, condition, seed=0):
    generator = np.random.default_rng(seed)
    U = np.linalg.qr(generator.standard_normal((rows, columns)))[0]
    V = np.linalg.qr(generator.standard_normal((columns, columns)))[0]
    return ((U * np.geomspace(1, 1 / condition, columns)) @ V.T).astype(np.float32)


def graph_of(rows, columns, *, copies=1):
    """The graph that makes the basis of a matrix, several times in one."""
    builder = GraphBuilder(nn.Module(), 20)
    kind = ir.TensorType(ir.DataType.FLOAT)
    value = ir.Value(name="matrix", shape=ir.Shape([rows, columns]), type=kind)
    builder.graph.inputs.append(value)
    for _ in range(copies):
        value = write_orthonormalize(builder, value, rows, columns)
    value.name, value.shape, value.type = "basis", ir.Shape([rows, columns]), kind
    builder.graph.outputs.append(value)
    model = ir.Model(builder.graph, ir_version=9)
    common.NameFixPass()(model)
    return ir.to_proto(model)


def basis_of(matrix, **options):
    model = graph_of(*matrix.shape, **options)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString())
    return session.run(None, {"matrix": matrix})[0]


def wrongness(basis):
    basis = basis.astype(np.float64)
    return np.abs(basis.T @ basis - np.eye(basis.shape[1])).max()


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("shape", [(200, 33), (64, 64), (7, 1)])
def test_columns_are_orthonormal_and_span_the_matrix(shape, condition):
    matrix = matrix_of_condition(*shape, condition)
    basis = basis_of(matrix)
    assert wrongness(basis) < ORTHOGONAL
    left_out = matrix - basis @ (basis.T @ matrix)
    assert np.linalg.norm(left_out) < 1e-6 * np.linalg.norm(matrix)  # the rounding of the products


@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_the_projector_is_that_of_qr(condition):
    matrix = matrix_of_condition(200, 24, condition)
    basis = torch.from_numpy(basis_of(matrix)).double()
    Q = torch.linalg.qr(torch.from_numpy(matrix).double())[0]
    # The space itself is known no better than the condition times the rounding of fp32.
    assert (basis @ basis.T - Q @ Q.T).norm() < 3e-7 * condition * 24**0.5 + 2e-6


def test_columns_point_as_those_of_the_operator_in_torch():
    matrix = matrix_of_condition(60, 12, 30)
    expected = tucker.orthonormalize(torch.from_numpy(matrix)).numpy()
    np.testing.assert_allclose(basis_of(matrix), expected, atol=3e-5)  # condition 30 times the rounding
    np.testing.assert_array_equal(orthonormalize(torch.from_numpy(matrix)).numpy(), expected)


def test_a_column_that_is_not_new_gives_way_to_an_axis():
    matrix = matrix_of_condition(40, 8, 10)
    matrix[:, 3], matrix[:, 5], matrix[:, 7] = matrix[:, 1], 0.0, matrix[:, 0] - 2 * matrix[:, 2]
    basis = basis_of(matrix)
    assert wrongness(basis) < ORTHOGONAL
    assert np.linalg.norm(matrix - basis @ (basis.T @ matrix)) < 1e-6 * np.linalg.norm(matrix)


def test_nothing_at_all_gives_a_basis():
    assert wrongness(basis_of(np.zeros((9, 4), np.float32))) == 0


def test_a_number_that_is_not_finite_is_not_hidden():
    matrix = matrix_of_condition(20, 4, 10)
    matrix[3, 2] = np.inf
    assert np.isnan(basis_of(matrix)).any()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    matrix = matrix_of_condition(50, 6, 10)
    np.testing.assert_allclose(basis_of(matrix * np.float32(scale)), basis_of(matrix), atol=1e-5)


def test_one_graph_may_have_many_loops():
    matrix = matrix_of_condition(30, 5, 10)
    np.testing.assert_allclose(basis_of(matrix, copies=3), basis_of(matrix), atol=1e-6)


def test_the_node_count_does_not_depend_on_the_rank():
    small, large = graph_of(64, 2), graph_of(64, 64)
    assert len(small.graph.node) == len(large.graph.node) == 4
    (loop,) = (node for node in large.graph.node if node.op_type == "Loop")
    assert len(loop.attribute[0].g.node) < 30
