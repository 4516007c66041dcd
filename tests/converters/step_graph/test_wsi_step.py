import copy

import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from factored_step import (
    DIM,
    FACTORS,
    HIDDEN,
    LAYERS,
    TRAINED,
    TorchSteps,
    bases_of,
    batches,
    make_model,
    open_step,
    relative,
)
from torch import nn

from wasi_export.config import Config
from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.optimizers import Rates
from wasi_export.converters.step_graph.rates import parameter_rates
from wasi_export.errors import ConfigError
from wasi_export.manifest import STEP
from wasi_export.subspace import SubspaceLinear
from wasi_export.subspace.tucker import orthonormalize

PLAIN = {name: Rates(decay=0.0) for name in TRAINED if name.endswith(("bias", "norm.weight"))}


@pytest.mark.parametrize(
    ("opt", "momentum", "token", "recompute"),
    [("sgd", 0.0, None, "none"), ("sgd", 0.9, 5, "none"), ("adamw", 0.9, None, "block")],
)
def test_steps_are_those_of_training(opt, momentum, token, recompute, tmp_path):
    model, bases = make_model(), bases_of(6, 8, token)
    lr, decay, clip = (0.1 if opt == "sgd" else 2e-3), 0.05, 2.0
    rates = PLAIN | dict.fromkeys(FACTORS, Rates(lr=0.3 / lr))
    settings = StepSettings(
        opt=opt, recompute=recompute, rates=rates, momentum=momentum, bases=bases, wsi=True
    )
    session = open_step(model, settings, tmp_path)
    training = TorchSteps(model, settings, lr=lr, decay=decay)
    for images, labels in batches([6, 3, 8, 1] * 6):
        result = session.step(images.numpy(), labels.numpy(), lr=lr, weight_decay=decay, clip_norm=clip)
        assert result.loss == pytest.approx(training.step(images, labels, clip), abs=1e-5)
    found = {name: torch.from_numpy(array) for name, array in session.tensors().items()}
    start, end = dict(model.named_parameters()), dict(training.model.named_parameters())
    for name in TRAINED:  # both are 1e-5 to 5e-5 away from the same steps in fp64: rounding, 24 times
        assert relative(found[name], end[name], start[name]) < 1e-4, name
    for layer in LAYERS:
        basis = found[f"{layer}.feature_basis"]
        torch.testing.assert_close(basis, training.bases[layer].feature, atol=2e-4, rtol=0)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_where_the_gradient_is_exact_a_step_is_the_dense_one_and_a_projection(recompute, tmp_path):
    model, lr, decay = make_model(), 0.3, 0.1
    settings = StepSettings(
        opt="sgd", recompute=recompute, momentum=0.0, wsi=True, bases=bases_of(DIM, HIDDEN)
    )
    ((images, labels),) = batches([7])
    expected = {}
    for layer in LAYERS:
        left, right = model.get_submodule(layer).left.detach(), model.get_submodule(layer).right.detach()
        new = dense_step(model, layer, images, labels, lr, decay).double()
        V = orthonormalize(new.T @ left.double())
        P = orthonormalize(new @ V)
        expected[layer] = left @ right, P @ P.T @ new
    session = open_step(model, settings, tmp_path)
    session.step(images.numpy(), labels.numpy(), lr=lr, weight_decay=decay)
    found = {name: torch.from_numpy(array) for name, array in session.tensors().items()}
    for layer, (before, after) in expected.items():
        left = found[f"{layer}.left"]
        assert relative(left @ found[f"{layer}.right"], after, before) < 1e-5
        assert (left.T @ left - torch.eye(left.shape[1])).abs().max() < 1e-6


def dense_step(model, name, images, labels, lr, decay):
    """Returns the weight of a layer after a step of gradient descent on it, the layer made dense."""
    model, layer = copy.deepcopy(model), model.get_submodule(name)
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    with torch.no_grad():
        dense.weight.copy_(layer.left @ layer.right)
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    model.set_submodule(name, dense)
    F.cross_entropy(model(images), labels).backward()
    return ((1 - lr * decay) * dense.weight - lr * dense.weight.grad).detach()


def test_no_tensor_has_the_shape_of_the_weight(tmp_path):
    settings = StepSettings(opt="sgd", recompute="none", wsi=True, bases=bases_of(6, 8))
    open_step(make_model(), settings, tmp_path)
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / STEP), strict_mode=True, data_prop=True)
    shapes = {
        tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in model.graph.value_info
    }
    assert (HIDDEN, 6) in shapes  # the coefficients of fc1
    assert not {(HIDDEN, DIM), (DIM, HIDDEN)} & shapes


def test_momentum_begins_with_nothing(tmp_path):
    settings = StepSettings(opt="sgd", recompute="none", wsi=True, bases=bases_of(6, 8))
    session = open_step(make_model(), settings, tmp_path)
    for name, array in session.tensors().items():
        if name.endswith(".previous") or name == "optimizer.last_lr":
            assert not array.any()
    ((images, labels),) = batches([4])
    session.step(images.numpy(), labels.numpy(), lr=0.0)
    assert session.tensors()["blocks.0.fc1.left.previous"].any()
    session.step(images.numpy(), labels.numpy(), lr=0.1)
    assert session.tensors()["optimizer.last_lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("trained", "bases", "message"),
    [
        (("blocks.1.fc1.right", "head.weight"), bases_of(6, 8), "only right of blocks.1.fc1 is trained"),
        (
            TRAINED,
            {LAYERS[0]: bases_of(6, 8)[LAYERS[0]]},
            "blocks.0.fc2 keeps its input whole: set adapt.act",
        ),
        (("head.weight",), bases_of(6, 8), "for factored layers, and none is trained"),
    ],
)
def test_what_the_rule_cannot_have_is_refused(trained, bases, message, tmp_path):
    settings = StepSettings(opt="sgd", recompute="none", wsi=True, bases=bases)
    with pytest.raises(ConfigError, match=message):
        open_step(make_model(), settings, tmp_path, trained)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"factor_lr": 0.1}, 'got activation = "none": set activation = "feature"'),
        ({"activation": "feature"}, "set factor_lr to a number, got 'auto'"),
    ],
)
def test_a_configuration_that_lacks_what_the_rule_needs_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_mapping({"adapt": {"update": "wsi", **given}}, origin="test")


def test_the_rate_of_the_factors_is_the_one_that_was_given():
    rates = parameter_rates(make_timm_model(), ["blocks.0.attn.qkv.left", "head.weight"], factors=50.0)
    assert rates["blocks.0.attn.qkv.left"] == Rates(lr=50.0)
    assert rates["head.weight"] == Rates()


def make_timm_model():
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    model.blocks[0].attn.qkv = SubspaceLinear(64, 192, 4)
    return model
