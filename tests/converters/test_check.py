"""A graph of one factored and one dense layer, in ONNX text, and every way in which it may be wrong."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from wasi_export.converters.check import check_factors, graph_facts, newest_opset
from wasi_export.errors import CheckFailedError, ConfigError
from wasi_export.ranks import LayerPlan, Plan

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
main (float[B, 6] images) => (float[B, 6] logits)
<float[2, 6] "fc1.right", float[8, 2] "fc1.left", float[8] "fc1.bias", float[6, 8] "fc2.weight">
{
    code = Gemm <transB = 1> (images, "fc1.right")
    hidden = Gemm <transB = 1> (code, "fc1.left", "fc1.bias")
    logits = Gemm <transB = 1> (hidden, "fc2.weight")
}
"""


def layer(name: str, in_features: int, out_features: int, rank: int | None) -> LayerPlan:
    return LayerPlan(
        name=name,
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        method=None if rank is None else "plain",
        energy=None,
        reason="for the test",
    )


PLAN = Plan(activation_mode="none", layers=(layer("fc1", 6, 8, 2), layer("fc2", 8, 6, None)))


def make_model(text: str = TEXT) -> onnx.ModelProto:
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in {
        "fc1.right": (2, 6), "fc1.left": (8, 2), "fc1.bias": (8,), "fc2.weight": (6, 8),
    }.items():  # fmt: skip
        add(model, name, rng.standard_normal(shape))
    return model


def add(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))


def value_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def product(model: onnx.ModelProto) -> np.ndarray:
    dense: np.ndarray = value_of(model, "fc1.left") @ value_of(model, "fc1.right")
    return dense


def fold(model: onnx.ModelProto) -> None:
    """Does what an optimiser does that folds constants across the two Gemms."""
    add(model, "folded", product(model))
    del model.graph.node[:2]
    node = helper.make_node("Gemm", ["images", "folded", "fc1.bias"], ["hidden"], transB=1)
    model.graph.node.insert(0, node)


def drop_left(model: onnx.ModelProto) -> None:
    rest = [tensor for tensor in model.graph.initializer if tensor.name != "fc1.left"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)


def transpose_right(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "fc1.right")
    tensor.CopyFrom(numpy_helper.from_array(value_of(model, "fc1.right").T.copy(), "fc1.right"))
    model.graph.node[0].attribute[0].i = 0


def use_right_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", ["fc1.right"], ["unused"]))


def make_it_an_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("fc1.left", TensorProto.FLOAT, [8, 2]))


def put_it_in_another_file(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def use_a_foreign_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    node = helper.make_node("QuickGelu", ["hidden"], ["unused"], domain="com.microsoft")
    model.graph.node.append(node)


def break_the_graph(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[0] = "nothing"


Change = Callable[[onnx.ModelProto], None]

WRONG: dict[str, tuple[Change, str]] = {
    "the product is folded": (fold, "folded is the product of the factors of fc1"),
    "the product is there beside the factors": (
        lambda m: add(m, "x", product(m)),
        "x is the product of the factors of fc1",
    ),
    "the product is there transposed": (
        lambda m: add(m, "x", product(m).T.copy()),
        "x is the product of the factors of fc1",
    ),
    "the product is there, scaled": (
        lambda m: add(m, "val_7", 1.7 * product(m)),
        "val_7 has the dense shape [8, 6] of fc1, which is factored",
    ),
    "the product is there as the filters of a convolution": (
        lambda m: add(m, "x", product(m)[:, :, None, None]),
        "x is the product of the factors of fc1",
    ),
    "another dense weight has its name": (
        lambda m: add(m, "fc1.weight", np.ones((8, 6))),
        "fc1.weight has the dense shape [8, 6] of fc1, which is factored",
    ),
    "a factor is missing": (drop_left, "there is no initializer fc1.left"),
    "a factor is transposed": (transpose_right, "fc1.right has shape [6, 2], the plan says [2, 6]"),
    "a factor is used for something else": (use_right_twice, "fc1.right is used 2 times"),
    "a factor is an input": (make_it_an_input, "fc1.left is an input of the graph too"),
    "data is in another file": (put_it_in_another_file, "fc1.right is in another file"),
    "an operator is foreign": (use_a_foreign_operator, "operators outside the standard (com.microsoft)"),
    "the graph is broken": (break_the_graph, "it is not valid ONNX"),
}


def cut_left(model: onnx.ModelProto, rows: int) -> None:
    """Gives the first rows of left a Gemm of their own, as `passes/token_selection.py` does."""
    left = value_of(model, "fc1.left")
    drop_left(model)
    add(model, f"fc1.left[:{rows}]", left[:rows])
    add(model, f"fc1.left[{rows}:]", left[rows:])
    second = model.graph.node[1]
    del model.graph.node[1]
    for index, part in enumerate((f"[:{rows}]", f"[{rows}:]")):
        node = helper.make_node("Gemm", ["code", f"fc1.left{part}"], [f"part{index}"], transB=1)
        model.graph.node.insert(1 + index, node)
    model.graph.node.insert(3, helper.make_node("Concat", ["part0", "part1"], ["sum"], axis=1))
    model.graph.node.insert(4, helper.make_node("Add", ["sum", "fc1.bias"], second.output))


def test_a_factor_may_be_two_parts_of_its_rows() -> None:
    model = make_model()
    product_ = product(model)
    cut_left(model, 3)
    check_factors(model, PLAN)
    add(model, "x", product_)
    with pytest.raises(CheckFailedError, match=r"x is the product of the factors of fc1"):
        check_factors(model, PLAN)


def test_a_factor_may_be_part_of_a_product_of_two() -> None:
    model = make_model()
    cut_left(model, 3)
    for tensor in model.graph.initializer:
        if tensor.name == "fc1.left[3:]":
            tensor.name = "other.right @ fc1.left[3:]"
    model.graph.node[2].input[1] = "other.right @ fc1.left[3:]"
    check_factors(model, PLAN)
    for tensor in model.graph.initializer:
        if tensor.name == "other.right @ fc1.left[3:]":
            tensor.name = "other.right @ fc1.left[4:]"
    model.graph.node[2].input[1] = "other.right @ fc1.left[4:]"
    with pytest.raises(CheckFailedError, match=r"fc1.left has shape \[3, 2\]"):
        check_factors(model, PLAN)


@pytest.mark.parametrize(
    ("part", "message"),
    [(0, r"fc1.left has shape \[5, 2\]"), (1, r"fc1.left has shape \[3, 2\]")],
    ids=["the first", "the second"],
)
def test_both_parts_must_be_there(part: int, message: str) -> None:
    model = make_model()
    cut_left(model, 3)
    del model.graph.node[1 + part], model.graph.initializer[len(model.graph.initializer) - 2 + part]
    with pytest.raises(CheckFailedError, match=message):
        check_factors(model, PLAN)


@pytest.mark.parametrize(
    ("runtime", "opset"), [("1.17", 20), ("1.18.1", 21), ("1.22", 22), ("1.23.2", 23), ("2.0", 25)]
)
def test_the_newest_opset_of_a_runtime_is_known(runtime: str, opset: int) -> None:
    assert newest_opset(runtime) == opset


@pytest.mark.parametrize("runtime", ["1.16.3", "new", ""])
def test_a_runtime_that_is_too_old_or_none_is_refused(runtime: str) -> None:
    with pytest.raises(ConfigError, match=rf"target runtime '{runtime}' is not a version from 1.17 on"):
        newest_opset(runtime)


def test_a_model_as_planned_passes() -> None:
    check_factors(make_model(), PLAN)


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(change: Change, message: str) -> None:
    model = make_model()
    change(model)
    with pytest.raises(CheckFailedError) as raised:
        check_factors(model, PLAN)
    assert message in str(raised.value)


CONVOLUTIONS = """
<ir_version: 10, opset_import: ["" : 23]>
main (float[B, 6, 4, 4] images) => (float[B, 8, 4, 4] logits)
<float[2, 6] "fc1.right", float[8, 2] "fc1.left", float[8] "fc1.bias", float[6, 8] "fc2.weight",
 int64[4] first = {{2, {channels}, {kernel}, {kernel}}}, int64[4] second = {{8, 2, 1, 1}}>
{{
    right = Reshape ("fc1.right", first)
    left = Reshape ("fc1.left", second)
    code = Conv <kernel_shape = [{kernel}, {kernel}]> ({arguments})
    logits = Conv <kernel_shape = [1, 1]> (code, left, "fc1.bias")
}}
"""


def test_factors_as_the_filters_of_two_convolutions_pass() -> None:
    text = CONVOLUTIONS.format(channels=6, kernel=1, arguments="images, right")
    check_factors(make_model(text), PLAN)


@pytest.mark.parametrize(
    "text",
    [
        CONVOLUTIONS.format(channels=6, kernel=1, arguments="right, images"),
        CONVOLUTIONS.format(channels=6, kernel=1, arguments="images, right").replace(
            "left = ", "other = Relu (right) left = "
        ),
        CONVOLUTIONS.format(channels=1, kernel=3, arguments="images, right"),
    ],
    ids=["as the input", "for something else too", "as larger filters"],
)
def test_a_factor_is_the_filters_of_one_1x1_convolution_and_nothing_else(text: str) -> None:
    with pytest.raises(CheckFailedError, match=r"fc1\.right is not the weight of a Gemm or of a 1×1 Conv"):
        check_factors(make_model(text), PLAN)


def test_all_that_is_wrong_is_said_at_once() -> None:
    model = make_model()
    drop_left(model)
    use_a_foreign_operator(model)
    with pytest.raises(
        CheckFailedError, match=r"outside the standard .*; .*there is no initializer fc1\.left"
    ):
        check_factors(model, PLAN)


@pytest.mark.parametrize(
    ("opset", "ir_version", "first"),
    [
        (18, 8, "1.17"),
        (20, 10, "1.18"),
        (22, 10, "1.21"),
        (23, 10, "1.23"),
        (23, 13, "1.24"),
        (25, 10, "1.24"),
    ],
)
def test_the_first_onnxruntime_follows_from_both_versions(opset: int, ir_version: int, first: str) -> None:
    text = TEXT.replace('"" : 23', f'"" : {opset}').replace("ir_version: 10", f"ir_version: {ir_version}")
    facts = graph_facts(make_model(text))
    assert (facts.opset, facts.ir_version, facts.min_onnxruntime) == (opset, ir_version, first)
    assert facts.nodes == {"Gemm": 3}


WIDENING = """
<ir_version: 10, opset_import: ["" : 23]>
main (float[B, 6] images) => (float[B, 12] logits)
<float[2, 6] "fc1.right", float[8, 2] "fc1.left", float[6, 8] "fc2.weight", float[8, 6] "fc3.right",
 float[12, 8] "fc3.left">
{
    code = Gemm <transB = 1> (images, "fc1.right")
    hidden = Gemm <transB = 1> (code, "fc1.left")
    middle = Gemm <transB = 1> (hidden, "fc2.weight")
    code3 = Gemm <transB = 1> (middle, "fc3.right")
    logits = Gemm <transB = 1> (code3, "fc3.left")
}
"""


def test_a_factor_may_have_the_shape_of_another_layers_dense_weight() -> None:
    model, rng = make_model(WIDENING), np.random.default_rng(1)
    for name, shape in {"fc3.right": (8, 6), "fc3.left": (12, 8)}.items():
        add(model, name, rng.standard_normal(shape))
    del model.graph.initializer[2]  # fc1.bias
    layers = (*PLAN.layers, layer("fc3", 6, 12, 8))
    check_factors(model, Plan(activation_mode="none", layers=layers))
    with pytest.raises(CheckFailedError, match=r"fc3\.right has the dense shape"):
        check_factors(model, PLAN)


def test_of_many_things_that_are_wrong_the_first_are_told() -> None:
    layers = tuple(layer(f"other{index}", 6, 8, 2) for index in range(9))
    with pytest.raises(CheckFailedError, match=r"and 13 more$") as told:
        check_factors(make_model(), Plan(activation_mode="none", layers=layers))
    assert str(told.value).count("there is no initializer") == 5
