import json
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from factored_step import (
    DIM,
    HIDDEN,
    LAYERS,
    SPEC,
    TRAINED,
    TorchSteps,
    bases_of,
    batches,
    make_model,
    open_step,
    relative,
)

from wasi_export.converters.step_graph import compress
from wasi_export.converters.step_graph.first_bases import first_bases
from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.training_step import export_training_step
from wasi_export.subspace.tucker import follow

RANKS = {"fc1": 4, "fc2": 5}
MODES = [(None, "none"), (None, "block"), (4, "none"), (4, "fine")]


@pytest.mark.parametrize(("token", "recompute"), MODES)
def test_steps_are_those_of_the_layers_of_training_in_the_same_bases(token, recompute, tmp_path):
    model = make_model()
    settings = StepSettings(opt="sgd", recompute=recompute, bases=bases_of(**RANKS, token=token))
    session = open_step(model, settings, tmp_path)
    training = TorchSteps(model, settings, lr=0.3, decay=0.05)
    for images, labels in batches([6, 2, 9, 3]):
        result = session.step(images.numpy(), labels.numpy(), lr=0.3, weight_decay=0.05, clip_norm=1.0)
        assert result.loss == pytest.approx(training.step(images, labels, 1.0), abs=2e-6)
    found = {name: torch.from_numpy(array) for name, array in session.tensors().items()}
    start, end = dict(model.named_parameters()), dict(training.model.named_parameters())
    for name in TRAINED:  # four steps of rounding, in sums of up to 9·16 products
        assert relative(found[name], end[name], start[name]) < 2e-5, name
    for layer, bases in training.bases.items():
        torch.testing.assert_close(found[f"{layer}.feature_basis"], bases.feature, atol=2e-5, rtol=0)
        if token is not None:
            torch.testing.assert_close(found[f"{layer}.token_basis"], bases.token, atol=2e-5, rtol=0)


@pytest.mark.parametrize("token", [None, 16])
def test_in_bases_of_full_rank_the_step_is_the_exact_one(token, tmp_path):
    model, bases = make_model(), bases_of(DIM, HIDDEN, token)
    exact = open_step(model, StepSettings(opt="sgd", recompute="none"), tmp_path / "exact")
    session = open_step(model, StepSettings(opt="sgd", recompute="none", bases=bases), tmp_path / "kept")
    for images, labels in batches([4, 3]):
        expected = exact.step(images.numpy(), labels.numpy(), lr=0.3)
        assert session.step(images.numpy(), labels.numpy(), lr=0.3).loss == pytest.approx(
            expected.loss, abs=1e-6
        )
    for name in TRAINED:
        np.testing.assert_allclose(session.tensors()[name], exact.tensors()[name], atol=2e-6)


def test_moments_are_those_of_the_bases_of_training():
    x = torch.randn(3, 16, DIM, generator=torch.Generator().manual_seed(0))
    bases = bases_of(**RANKS, token=6)[LAYERS[0]]
    _, moments = compress.compress(x, bases)
    expected = follow(x, bases)
    for part in ("feature", "token"):
        found = torch.linalg.qr(moments[f"{part}_basis"])[0]
        torch.testing.assert_close(found.abs(), getattr(expected, part).abs(), atol=1e-5, rtol=0)


def test_first_bases_hold_the_energy_that_was_asked_for_and_begin_the_state(tmp_path):
    model = make_model()
    images = batches([8])[0][0]
    bases = first_bases(model, TRAINED, images.numpy(), "feature+token", 0.9)
    assert bases.keys() == set(LAYERS)
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0]}))
        for name in LAYERS
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    for name, x in seen.items():
        U, V = bases[name].feature, bases[name].token
        for basis, unfolded in ((U, x.flatten(0, 1).T), (V, x.transpose(0, 1).flatten(1))):
            kept = (basis.T @ unfolded).square().sum() / unfolded.square().sum()
            less = (basis[:, :-1].T @ unfolded).square().sum() / unfolded.square().sum()
            assert less < 0.9 <= kept + 1e-6
    session = open_step(model, StepSettings(opt="sgd", recompute="none", bases=bases), tmp_path)
    for name in LAYERS:
        np.testing.assert_array_equal(session.tensors()[f"{name}.token_basis"], bases[name].token)


@pytest.mark.parametrize("training", [True, False])
def test_taking_first_bases_leaves_the_model_as_it_was(training):
    model = make_model().train(training)
    first_bases(model, TRAINED, batches([8])[0][0].numpy(), "feature", 0.9)
    assert model.training == training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_only_layers_that_are_trained_have_bases():
    images = batches([8])[0][0].numpy()
    found = first_bases(make_model(), [LAYERS[1] + ".right"], images, "feature", 0.9)
    assert list(found) == [LAYERS[1]]
    assert found[LAYERS[1]].token is None
    assert first_bases(make_model(), TRAINED, images, "none", 0.9) == {}
    assert first_bases(make_model(), TRAINED, images, "feature", 1.0).keys() < set(
        LAYERS
    )  # the rest is whole


@pytest.mark.parametrize("token", [None, 4])
def test_no_input_of_a_compressed_layer_is_read_after_the_loss(token, tmp_path):
    assert not late_inputs(export(token), tmp_path)


@pytest.mark.parametrize("token", [None, 4])
def test_without_the_barrier_the_inputs_are_kept_for_the_backward_pass(token, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "after", lambda value, *others: value)
    assert late_inputs(export(token, has_barrier=False), tmp_path) == set(LAYERS)


@pytest.mark.parametrize("wsi", [False, True])
def test_a_block_that_is_computed_again_lets_go_of_its_inputs_before_the_one_below(wsi, tmp_path):
    assert not late_inputs_again(export(None, "block", wsi), tmp_path)


def test_without_the_barrier_it_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "after", lambda value, *others: value)
    assert late_inputs_again(export(None, "block", has_barrier=False), tmp_path) == {LAYERS[2]}


@cache
def export(token, recompute="none", wsi=False, has_barrier=True):
    """Returns a step and its state; the last argument tells apart what is kept from what a test changed."""
    settings = StepSettings(
        opt="sgd", recompute=recompute, wsi=wsi, momentum=0.0, bases=bases_of(**RANKS, token=token)
    )
    exported = export_training_step(make_model(), SPEC, TRAINED, settings)
    return exported.step, exported.parameters | exported.optimizer


def late_inputs(exported, folder):
    """Returns the layers whose input onnxruntime reads after the loss, in the order in which it runs."""
    nodes = executed_nodes(*exported, folder)
    loss = next(place for place, node in enumerate(nodes) if node.op_type == "LogSoftmax")
    return {layer for layer in LAYERS if last_read(nodes, layer, 0) > loss}


def late_inputs_again(exported, folder):
    """The same of fc1 of the second block, made again, and of the second pass of the first block."""
    nodes = executed_nodes(*exported, folder)
    below = uses_of(nodes, LAYERS[0])[1]
    return {layer for layer in LAYERS[2:3] if last_read(nodes, layer, 1) > below}


def uses_of(nodes, layer):
    """Returns where products with `right` of a layer are: once for every time that it is computed."""
    return [place for place, node in enumerate(nodes) if f"{layer}.right" in node.input]


def last_read(nodes, layer, turn):
    """Returns where the input of a layer is read for the last time, of its first or second pass."""
    views = [node for node in nodes if node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Identity")]
    memory = names_of_one_memory(nodes[uses_of(nodes, layer)[turn]].input[0], views)
    return max(place for place, node in enumerate(nodes) if memory & set(node.input) and node not in views)


def names_of_one_memory(name, views):
    """Returns all names of a tensor, which views share with it."""
    found, size = {name}, 0
    while len(found) > size:
        size = len(found)
        for view in views:
            ends = {view.input[0], view.output[0]}
            found |= ends if ends & found else set()
    return found


def executed_nodes(model, state, folder):
    """Returns the nodes of a step in the order in which onnxruntime ran them."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # as the board runs it
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(model.SerializeToString(), options)
    images, labels = batches([4])[0]
    scalars = {name: np.array(0.1, np.float32) for name in ("lr", "weight_decay", "clip_norm")}
    session.run(None, {"images": images.numpy(), "targets": labels.numpy(), **scalars, **state})
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    order = [e["name"].removesuffix("_kernel_time") for e in sorted(kernels, key=lambda event: event["ts"])]
    nodes = {node.name: node for node in model.graph.node}
    return [nodes[name] for name in order if name in nodes]  # the others are in loops


def test_a_basis_costs_a_fixed_number_of_nodes():
    settings = StepSettings(opt="sgd", recompute="none", bases=bases_of(8, 12))
    other = export_training_step(make_model(), SPEC, TRAINED, settings).step
    assert len(other.graph.node) == len(export(None)[0].graph.node)


def test_the_graph_is_of_standard_operators():
    model, _ = export(4)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
