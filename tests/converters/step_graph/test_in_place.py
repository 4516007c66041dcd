"""May the new state be written over the old: graphs by hand, every order of small ones, and the real one."""

from itertools import permutations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, parser
from torch import nn
from training_steps import GraphStep, Scalars, labelled, make_random, spec_for

from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.in_place import check_in_place
from wasi_export.converters.training_step import ExportedStep, export_training_step
from wasi_export.errors import CheckFailedError

HEAD = '<ir_version: 9, opset_import: ["" : 20]> step (float[2, 2] x, float[2, 2] w, float[2, 2] v)'


def graph(body: str, outputs: str = "float[2, 2] w_next") -> onnx.ModelProto:
    return parser.parse_model(f"{HEAD} => ({outputs}) {{ {body} }}")


W = [("w", "w_next")]


def test_an_update_after_every_reader_is_accepted() -> None:
    check_in_place(graph("y = MatMul (x, w)  g = MatMul (x, y)  w_next = Sub (w, g)"), W)


@pytest.mark.parametrize(
    ("body", "states", "message"),
    [
        (
            "g = MatMul (x, x)  w_next = Sub (w, g)  y = MatMul (x, w)",
            W,
            "w may be read by MatMul",
        ),
        ("w_next = MatMul (x, w)", W, "w may be read by MatMul"),
        ("w_next = Softmax (w)  y = Add (w, x)", W, "w may be read by Add"),
        ("w_next = Identity (v)  v_next = Identity (w)", [*W, ("v", "v_next")], "v may be read by Identity"),
    ],
    ids=["a reader that the update does not need", "not element by element", "both", "exchanged"],
)
def test_a_reader_that_may_come_late_is_refused(
    body: str, states: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(CheckFailedError, match=f"cannot work in place: .*{message}.* after it was written"):
        check_in_place(graph(body), states)


def test_many_problems_are_one_error() -> None:
    body = " ".join(f"n{i} = Neg (x) " for i in range(4)) + " y = Sum (w, v, x)"
    states = [("w", "n0"), ("v", "n1"), ("x", "n2"), ("x", "n3")]
    with pytest.raises(CheckFailedError, match=r"x may be read by .* \(and 1 more\)"):
        check_in_place(graph(body), states)


Node = tuple[bool, tuple[str, ...]]


@st.composite
def small_graphs(draw: st.DrawFn) -> list[Node]:
    """Nodes that are element by element or not, each reading some of x, w, v and of the nodes before it."""
    nodes: list[Node] = []
    for index in range(draw(st.integers(2, 5))):
        known = ["x", "w", "v", *(f"n{i}" for i in range(index))]
        reads = draw(st.lists(st.sampled_from(known), min_size=2, max_size=2))
        nodes.append((draw(st.booleans()), tuple(reads)))
    return nodes


def is_safe(nodes: list[Node], states: dict[str, int]) -> bool:
    """Returns whether no order of the nodes has a reader of a state after its writer, or beside it."""
    for state, writer in states.items():
        elementwise, reads = nodes[writer]
        if state in reads and not elementwise:
            return False
    for order in permutations(range(len(nodes))):
        place = {index: at for at, index in enumerate(order)}
        needs = ((index, int(name[1:])) for index, (_, r) in enumerate(nodes) for name in r if name[0] == "n")
        if any(place[source] > place[index] for index, source in needs):
            continue
        for state, writer in states.items():
            readers = [index for index, (_, reads) in enumerate(nodes) if state in reads and index != writer]
            if any(place[reader] > place[writer] for reader in readers):
                return False
    return True


@given(small_graphs(), st.data())
def test_a_graph_is_accepted_exactly_if_no_order_of_it_reads_late(
    nodes: list[Node], data: st.DataObject
) -> None:
    indices = data.draw(st.lists(st.integers(0, len(nodes) - 1), min_size=2, max_size=2, unique=True))
    states = dict(zip(("w", "v"), indices, strict=True))
    made = [
        helper.make_node("Add" if elementwise else "MatMul", list(reads), [f"n{index}"])
        for index, (elementwise, reads) in enumerate(nodes)
    ]
    model = helper.make_model(helper.make_graph(made, "step", [], []))
    pairs = [(state, f"n{index}") for state, index in states.items()]
    if is_safe(nodes, states):
        check_in_place(model, pairs)
    else:
        with pytest.raises(CheckFailedError):
            check_in_place(model, pairs)


@pytest.fixture(scope="module")
def exported() -> ExportedStep:
    """The step of a small net of two layers, to be read only."""
    torch.manual_seed(0)
    model = make_random(nn.Sequential(nn.Flatten(), nn.Linear(48, 9), nn.GELU(), nn.Linear(9, 5)))
    names = [name for name, _ in model.named_parameters()]
    return export_training_step(model, spec_for(4), names, StepSettings(opt="adamw", recompute="none"))


def states_of(exported: ExportedStep) -> list[tuple[str, str]]:
    return [(name, f"{name}.next") for name in (*exported.parameters, *exported.optimizer)]


def test_a_real_step_is_accepted_and_with_one_more_reader_refused(exported: ExportedStep) -> None:
    check_in_place(exported.step, states_of(exported))
    model = onnx.ModelProto()
    model.CopyFrom(exported.step)
    model.graph.node.append(helper.make_node("Neg", ["1.weight"], ["late"], name="watch"))
    with pytest.raises(CheckFailedError, match=r"1\.weight may be read by Neg watch after it was written"):
        check_in_place(model, states_of(exported))


@pytest.mark.parametrize("level", ["none", "all"])
def test_a_real_step_over_its_own_buffers_is_bit_for_bit_the_same(exported: ExportedStep, level: str) -> None:
    plain = GraphStep(exported, level=level)
    session = plain.session
    state = {name: ort.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in plain.state.items()}
    for images, labels in labelled((4, 1, 9, 4), (3, 4, 4), 5):
        binding = session.io_binding()
        binding.bind_cpu_input("images", images.numpy())
        binding.bind_cpu_input("targets", labels.numpy())
        scalars = Scalars(0.01, weight_decay=0.1, clip_norm=1.0)
        for name, value in vars(scalars).items():
            binding.bind_cpu_input(name, np.array(value, np.float32))
        for name, value in state.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("loss", "correct", "gradient_norm"):
            binding.bind_output(name)
        for name, value in state.items():
            binding.bind_ortvalue_output(f"{name}.next", value)
        session.run_with_iobinding(binding)
        assert plain.step(images, labels, scalars)[0] == binding.get_outputs()[0].numpy()
    for name, value in state.items():
        np.testing.assert_array_equal(value.numpy(), plain.state[name], err_msg=name)
