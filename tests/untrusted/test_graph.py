"""ONNX files that anybody may have written: what is not ours is refused before a runtime sees it."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.internal import encoder
from helpers import make_model
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from training_step_text import evaluate_model, step_model

from wasi_export.errors import MalformedError
from wasi_export.untrusted import graph
from wasi_export.untrusted.graph import check_graph

Edit = Callable[[onnx.ModelProto], object]


def model() -> onnx.ModelProto:
    return onnx.ModelProto.FromString(make_model())


def check(path: Path, data: bytes | onnx.ModelProto) -> graph.GraphFacts:
    path.write_bytes(data if isinstance(data, bytes) else data.SerializeToString())
    return check_graph(path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.onnx"


def test_a_model_of_ours_passes_and_says_what_it_takes(file: Path) -> None:
    facts = check(file, make_model())
    assert (facts.ir_version, facts.opset) == (10, 23)
    assert facts.inputs == {"images": (None, 3, 4, 4)}
    assert facts.outputs == {"logits": (None, 2)}


@pytest.mark.parametrize("make", [step_model, evaluate_model])
def test_a_training_step_passes(file: Path, make: Callable[[], bytes]) -> None:
    check(file, make())


@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, np.float16, np.int8, np.uint8, np.int32, np.int64, np.bool_]
)
@pytest.mark.parametrize("is_raw", [True, False])
def test_numbers_pass_in_every_form_that_onnx_has_for_them(file: Path, kind: type, is_raw: bool) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]], kind)
    found = model()
    tensor = numpy_helper.from_array(values, "more")
    if not is_raw:
        onnx_type = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = helper.make_tensor("more", onnx_type, values.shape, values.flatten())
    found.graph.initializer.append(tensor)
    check(file, found)


def external(location: str, **entries: str) -> Edit:
    """Gives the first initializer its data from a file."""

    def edit(found: onnx.ModelProto) -> None:
        tensor = found.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in ({"location": location} | entries).items():
            tensor.external_data.add(key=key, value=value)

    return edit


EXTERNAL = {
    "CVE-2022-25882, out of the folder": external("../../../etc/passwd"),
    "CVE-2024-27318, nested": external("sub/../../../../etc/passwd"),
    "CVE-2024-5187 and 7776, a prefix of the folder's name": external("../x.onnx_evil/data"),
    "CVE-2026-27489 and 34447, by a link": external("link"),
    "an absolute path": external("/etc/passwd"),
    "a UNC path": external("\\\\host\\share\\data"),
    "beside the model": external("weights.bin"),
    "negative offset": external("weights.bin", offset="-1", length="4"),
    "huge length": external("weights.bin", offset="0", length="9223372036854775807"),
    "no location at all": external(""),
    "said to be here, and elsewhere": lambda m: m.graph.initializer[0].external_data.add(
        key="location", value="x"
    ),
    "elsewhere, without saying where": lambda m: setattr(m.graph.initializer[0], "data_location", 1),
    "in an attribute": lambda m: m.graph.node.add(op_type="Constant").attribute.add(
        name="value", type=onnx.AttributeProto.TENSOR, t=TensorProto(data_location=1)
    ),
}


@pytest.mark.parametrize("edit", EXTERNAL.values(), ids=EXTERNAL.keys())
def test_no_other_file_is_read(file: Path, edit: Edit) -> None:
    (file.parent / "weights.bin").write_bytes(bytes(1000))
    (file.parent / "link").symlink_to("/etc/passwd")
    found = model()
    edit(found)
    with pytest.raises(MalformedError, match="are in another file, and no other file is read"):
        check(file, found)


def subgraphs(depth: int) -> onnx.GraphProto:
    inner = onnx.GraphProto(name="g")
    for _ in range(depth):
        outer = onnx.GraphProto(name="g")
        outer.node.add(op_type="If").attribute.add(
            name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner
        )
        inner = outer
    return inner


def first(**fields: object) -> Edit:
    """Sets fields of the first initializer."""

    def edit(found: onnx.ModelProto) -> None:
        tensor = found.graph.initializer[0]
        for name, value in fields.items():
            tensor.ClearField(name)
            (
                getattr(tensor, name).extend
                if isinstance(value, list)
                else lambda v, n=name: setattr(tensor, n, v)
            )(value)

    return edit


REFUSED: dict[str, tuple[Edit, str]] = {
    "a custom operator": (
        lambda m: setattr(m.graph.node[0], "domain", "evil"),
        "outside the standard, of 'evil'",
    ),
    "operators of one runtime": (
        lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"),
        "outside the standard",
    ),
    "a foreign opset": (
        lambda m: m.opset_import.add(domain="ai.onnx.contrib", version=1),
        "outside the standard",
    ),
    "a custom operator in a subgraph": (
        lambda m: m.graph.node.add(op_type="If").attribute.add(
            name="then_branch", g=onnx.GraphProto(node=[onnx.NodeProto(op_type="Evil", domain="evil")])
        ),
        "outside the standard",
    ),
    "functions": (lambda m: m.functions.add(name="f"), "it has functions"),
    "training info": (lambda m: m.training_info.add(), "it has training_info"),
    "sparse weights": (lambda m: m.graph.sparse_initializer.add(), "it has sparse_initializer"),
    "a sparse attribute": (
        lambda m: m.graph.node[0].attribute.add(name="s", sparse_tensors=[onnx.SparseTensorProto()]),
        "'s' is sparse",
    ),
    "a NaN weight": (
        first(raw_data=np.full(96, np.nan, np.float32).tobytes()),
        "'right' holds 96 NaN or infinite",
    ),
    "an infinite weight": (
        first(raw_data=np.full(96, np.inf, np.float32).tobytes()),
        "'right' holds 96 NaN or infinite",
    ),
    "a NaN attribute": (
        lambda m: m.graph.node[0].attribute.add(name="alpha", f=np.nan),
        "'alpha' holds 1 NaN or infinite",
    ),
    "NaN attributes": (
        lambda m: m.graph.node[0].attribute.add(name="a", floats=[1, np.nan]),
        "'a' holds 1 NaN or infinite",
    ),
    "a NaN constant": (
        lambda m: m.graph.node.add(op_type="Constant").attribute.add(
            name="value", t=numpy_helper.from_array(np.array([np.nan, 1], np.float32))
        ),
        "holds 1 NaN or infinite",
    ),
    "a shape below zero": (first(dims=[-2, -48]), "absurd shape"),
    "a shape whose product overflows": (first(dims=[2**32, 2**32]), "absurd shape"),
    "more axes than tensors have": (first(dims=[1] * 17), "absurd shape"),
    "another number of weights than the shape says": (
        first(dims=[2, 49]),
        r"has 96 numbers, its shape \[2, 49\]",
    ),
    "the numbers of a large tensor left out": (first(dims=[2**30, 2], raw_data=b""), "has 0 numbers"),
    "half a number": (first(raw_data=b"\0" * 383), "no whole numbers"),
    "numbers in two places": (first(float_data=[1.0] * 96), "are in float_data, raw_data"),
    "texts": (first(data_type=8, raw_data=b"", string_data=[b"x"] * 96), "is of type 8"),
    "an unknown type": (first(data_type=99), "is of type 99"),
    "a part of a tensor": (lambda m: m.graph.initializer[0].segment.SetInParent(), "are in another file"),
    "a name twice": (
        lambda m: m.graph.initializer.append(m.graph.initializer[0]),
        "two initializers have one name",
    ),
    "a name that clears the screen": (first(name="\x1b[2J"), "no name of a tensor"),
    "an input that clears the screen": (
        lambda m: setattr(m.graph.input[0], "name", "\x1b[2J"),
        "no name of a value",
    ),
    "an input larger than memory": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 2**40),
        "absurd shape",
    ),
    "a value of a shape below zero": (
        lambda m: m.graph.value_info.append(helper.make_tensor_value_info("v", 1, [-1])),
        "absurd shape",
    ),
    "graphs in graphs": (lambda m: m.graph.node.extend(subgraphs(9).node), "its graphs are 8 deep"),
    "no graph": (lambda m: m.ClearField("graph"), "it has no graph or no opset"),
    "no opset": (lambda m: m.ClearField("opset_import"), "it has no graph or no opset"),
}


@pytest.mark.parametrize(("edit", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_model_of_ours_has_is_refused_with_a_reason(file: Path, edit: Edit, reason: str) -> None:
    found = model()
    edit(found)
    with pytest.raises(MalformedError, match=reason) as caught:
        check(file, found)
    assert str(caught.value).isprintable()


def test_graphs_in_graphs_without_end_do_not_end_the_process(file: Path) -> None:
    inner = b""
    for _ in range(10_000):  # fields Graph.node, Node.attribute, Attribute.g
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            inner = tag + encoder._VarintBytes(len(inner)) + inner  # type: ignore[attr-defined]
    with pytest.raises(MalformedError, match="it is no ONNX"):
        check(file, make_model() + b"\x3a" + encoder._VarintBytes(len(inner)) + inner)  # type: ignore[attr-defined]


NAMES: Mapping[str, Edit] = {
    "input": lambda m: m.graph.node[0].input.__setitem__(0, "marked"),
    "output": lambda m: m.graph.node[0].output.__setitem__(0, "marked"),
    "name": lambda m: setattr(m.graph.node[0], "name", "marked"),
    "op_type": lambda m: setattr(m.graph.node[0], "op_type", "marked"),
    "dim_param": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "marked"),
}


@pytest.mark.parametrize("edit", NAMES.values(), ids=NAMES.keys())
def test_a_name_that_is_no_text_is_refused_though_nothing_reads_it_here(file: Path, edit: Edit) -> None:
    found = model()
    edit(found)
    check(file, found)
    with pytest.raises(MalformedError, match=r"it is no ONNX: .*UTF-8"):
        check(file, found.SerializeToString().replace(b"marked", b"marke\xff"))


def test_more_nodes_than_any_model_has_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MAX_NODES", 3)
    check(file, model())
    found = model()
    found.graph.node.add(op_type="If").attribute.add(name="then_branch", g=subgraphs(1))
    with pytest.raises(MalformedError, match="more than 3 nodes"):
        check(file, found)


def test_a_file_that_protobuf_cannot_hold_is_not_read(file: Path) -> None:
    with file.open("wb") as huge:
        huge.truncate(2**31)  # sparse: it takes no space
    with pytest.raises(MalformedError, match="it has 2147483648 bytes"):
        check_graph(file)


@pytest.mark.parametrize("data", [b"", b"\x08", b"\xff" * 100, b"\x80\x04\x95cos\nsystem\n"])
def test_what_is_no_onnx_is_refused(file: Path, data: bytes) -> None:
    with pytest.raises(MalformedError):
        check(file, data)


@given(st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 10**6))
def test_any_damage_ends_in_the_one_error_or_leaves_an_onnx(
    tmp_path_factory: pytest.TempPathFactory, where: int, mask: int, length: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.onnx"
    data = bytearray(make_model())
    data[where % len(data)] ^= mask
    with contextlib.suppress(MalformedError):
        check(file, bytes(data[: 1 + length % len(data)]))


def test_it_needs_no_onnx(file: Path) -> None:
    file.write_bytes(make_model())
    code = (
        "import sys; sys.modules['onnx'] = sys.modules['torch'] = None; from pathlib import Path; "
        f"from wasi_export.untrusted.graph import check_graph; print(check_graph(Path({str(file)!r})).opset)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "23\n"
