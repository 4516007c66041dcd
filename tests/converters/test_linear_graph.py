"""The graphs that the planner times compute a layer of the shapes they stand for."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from wasi_export.converters.linear_graph import linear_graph
from wasi_export.cost import LinearForm


@pytest.mark.parametrize("rank", [None, 3])
def test_the_graph_is_a_valid_model_of_the_layer(rank: int | None) -> None:
    form = LinearForm(out_features=7, in_features=5, tokens=4, rank=rank)
    model = onnx.load_from_string(linear_graph(form))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Gemm"] * (1 if rank is None else 2)
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    weight = values["weight"] if rank is None else values["left"] @ values["right"]
    assert sum(value.size for name, value in values.items() if name != "bias") == form.parameters
    rows = np.random.default_rng(0).standard_normal((4, 5), np.float32)
    (out,) = ReferenceEvaluator(model).run(None, {"rows": rows})
    np.testing.assert_allclose(out, rows @ weight.T, rtol=1e-5, atol=1e-5)  # sums of 5 in fp32
