import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from wasi_export.errors import ModelFailedError, UsageError
from wasi_export.runtimes.layer_profile import REST, compare_layers, layers_of_nodes, measure_layers

SIDE = 16  # pixels, of an image of one channel


def graph(path, *layers, wide=256):
    """Writes a model of Linear layers, each a pair where a rank is given, on the pixels of an image."""
    rng, tensors, nodes = np.random.default_rng(0), [], []

    def product(name, out, of, x):
        tensors.append(numpy_helper.from_array(rng.standard_normal((out, of), np.float32), name))
        nodes.append(helper.make_node("Gemm", [x, name], [f"{name}.out"], f"node of {name}", transB=1))
        return f"{name}.out"

    x = "rows"
    nodes.append(helper.make_node("Flatten", ["images"], [x], "flatten"))
    for name, rank in layers:
        if rank is None:
            x = product(f"{name}.weight", wide, wide, x)
        else:
            x = product(f"{name}.left", wide, rank, product(f"{name}.right", rank, wide, x))
    nodes.append(helper.make_node("Relu", [x], ["logits"], "relu"))
    made = helper.make_graph(
        nodes, "layers",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [None, 1, SIDE, wide // SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, wide])],
        tensors,
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_the_time_of_a_layer_is_that_of_its_products(tmp_path):
    path = graph(tmp_path / "m.onnx", ("blocks.0.fc1", None), ("blocks.0.fc2", 8), wide=1024)
    (times,) = measure_layers([path], rounds=8)
    assert set(times) == {"blocks.0.fc1", "blocks.0.fc2", REST}
    assert times["blocks.0.fc1"] > times["blocks.0.fc2"]  # a million products against 16 thousand
    assert times["blocks.0.fc2"] >= 0


def test_the_layers_of_two_models_are_beside_one_another_in_their_order(tmp_path):
    dense = graph(tmp_path / "dense.onnx", ("b", None), ("a", None), ("only", None))
    low_rank = graph(tmp_path / "low_rank.onnx", ("b", 16), ("a", None))
    found = compare_layers(dense, low_rank, rounds=4)
    assert [time.layer for time in found] == ["b", "a", "only", REST]
    assert [time.bundle_ms is None for time in found] == [False, False, True, False]
    assert list(tmp_path.iterdir()) == [*tmp_path.glob("*.onnx")]  # the profiles are gone


def test_weights_that_were_put_together_count_for_the_layer_named_first(tmp_path):
    path = graph(tmp_path / "m.onnx", ("a", None))
    model = onnx.load(path)
    model.graph.initializer[0].name = model.graph.node[1].input[1] = "a.proj.right @ a.qkv.left[384:]"
    onnx.save(model, path)
    assert set(layers_of_nodes(path).values()) == {"a.proj"}


def test_names_of_the_runtime_for_a_node_are_known(tmp_path):
    path = graph(tmp_path / "m.onnx", ("a", None))
    name = "node of a.weight"
    names = {name, f"fused {name}", f"{name}/MatMulAddFusion", "a.weight.out_nchwc"}
    assert set(layers_of_nodes(path)) == names


def test_a_convolution_is_a_layer_under_the_name_that_the_runtime_gives_it(tmp_path):
    weight = numpy_helper.from_array(np.ones((16, 16, 1, 1), np.float32), "stem.weight")
    made = helper.make_graph(
        [helper.make_node("Conv", ["images", "stem.weight"], ["logits"], "convolution")], "stem",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 16, 8, 8])],
        [weight],
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    (times,) = measure_layers([path], rounds=2)
    assert "stem" in times


def test_a_model_that_cannot_run_is_told(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelFailedError, match=r"m\.onnx does not load"):
        measure_layers([tmp_path / "m.onnx"])
    with pytest.raises(UsageError, match="no model file"):
        measure_layers([tmp_path / "missing.onnx"])
