"""What is just within the limits of an ONNX file, and what is just beyond."""

from pathlib import Path

import pytest
from helpers import make_model
from onnx import ModelProto, NodeProto, TensorProto, load_model_from_string

from wasi_export.errors import MalformedError
from wasi_export.untrusted.graph import MAX_BYTES, MAX_DEPTH, MAX_NODES, check_graph


def write(model: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def nested(graphs: int) -> ModelProto:
    """Returns a model of so many graphs, each in a node of the one before."""
    model = load_model_from_string(make_model())
    graph = model.graph
    for _ in range(graphs - 1):
        attribute = graph.node.add(op_type="If").attribute.add(name="then_branch")
        attribute.g.name = "inner"
        graph = attribute.g
    return model


def test_graphs_are_as_deep_as_the_limit_and_no_deeper(tmp_path):
    assert check_graph(write(nested(MAX_DEPTH), tmp_path)).opset == 23
    with pytest.raises(MalformedError, match=f"its graphs are {MAX_DEPTH} deep"):
        check_graph(write(nested(MAX_DEPTH + 1), tmp_path))


def test_a_file_has_as_many_nodes_as_the_limit_and_no_more(tmp_path):
    model = load_model_from_string(make_model())
    node = NodeProto(op_type="Identity")
    inner = model.graph.node.add(op_type="If").attribute.add(name="then_branch").g
    inner.node.extend([node] * (MAX_NODES - len(model.graph.node)))
    check_graph(write(model, tmp_path))
    inner.node.add(op_type="Identity")
    with pytest.raises(MalformedError, match="more than 200000 nodes"):
        check_graph(write(model, tmp_path))


def test_nodes_count_where_none_has_attributes(tmp_path):
    model = load_model_from_string(make_model())
    del model.graph.node[:]
    model.graph.node.extend([NodeProto(op_type="Relu")] * MAX_NODES)
    check_graph(write(model, tmp_path))
    model.graph.node.add(op_type="Relu")
    with pytest.raises(MalformedError, match="more than 200000 nodes"):
        check_graph(write(model, tmp_path))


def test_the_largest_file_is_what_protobuf_takes():
    assert MAX_BYTES == 2147483647


@pytest.mark.parametrize(("data", "message"), [(b"", "it has 0 bytes"), (b"\x08", "it is no ONNX")])
def test_an_empty_file_is_refused_by_its_size_and_a_short_one_for_what_it_holds(data, message, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(MalformedError, match=message):
        check_graph(path)


def test_the_first_opset_is_one(tmp_path):
    assert check_graph(write(load_model_from_string(make_model(opset=1)), tmp_path)).opset == 1


@pytest.mark.parametrize("numbers", [1, 3])
def test_a_tensor_has_as_many_numbers_as_its_shape(numbers, tmp_path):
    model = load_model_from_string(make_model())
    model.graph.initializer.add(
        name="two", data_type=TensorProto.FLOAT, dims=[2], raw_data=bytes(4 * numbers)
    )
    with pytest.raises(MalformedError, match=f"'two' has {numbers} numbers"):
        check_graph(write(model, tmp_path))


@pytest.mark.parametrize("field", ["string_data", "uint64_data"])
def test_numbers_in_a_field_of_another_type_are_refused_even_where_there_should_be_none(field, tmp_path):
    model = load_model_from_string(make_model())
    tensor = model.graph.initializer.add(name="empty", data_type=TensorProto.FLOAT, dims=[0])
    getattr(tensor, field).append(b"x" if field == "string_data" else 1)
    with pytest.raises(MalformedError, match=f"are in {field}"):
        check_graph(write(model, tmp_path))
