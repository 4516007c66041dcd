"""Which parameters a word or a pattern stands for."""

import pytest
import timm
import torch
from text_encoder import TextEncoder
from torch import nn

from wasi_export.config import SubspaceConfig
from wasi_export.converters.step_graph.rates import parameter_rates
from wasi_export.converters.step_graph.trainable import head_names, trainable_names
from wasi_export.errors import ConfigError
from wasi_export.subspace import factorize_model, subspace_layers
from wasi_export.subspace.update import rate_scale

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SIZES)


@pytest.fixture(scope="module")
def factored() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    config = SubspaceConfig(method="plain", fraction=0.5, activation="none")
    factorize_model(model, [], config, total=0)
    return model


def test_all_is_every_parameter_in_the_order_of_the_model(dense: nn.Module) -> None:
    assert trainable_names(dense, "all") == [name for name, _ in dense.named_parameters()]


def test_the_head_is_the_classifier(dense: nn.Module) -> None:
    assert trainable_names(dense, "head") == ["head.weight", "head.bias"]
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **SIZES)
    names = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert trainable_names(distilled, "head") == names


def test_factors_are_both_with_their_biases_and_the_head(factored: nn.Module) -> None:
    layers = [name for name, _ in subspace_layers(factored)]
    expected = {f"{name}.{part}" for name in layers for part in ("left", "right", "bias")} | head_names(
        factored
    )
    assert set(trainable_names(factored, "factors")) == expected
    right = {f"{name}.right" for name in layers} | head_names(factored)
    assert set(trainable_names(factored, "right")) == right


def test_the_last_blocks_come_with_the_norm_and_the_head(dense: nn.Module) -> None:
    names = trainable_names(dense, "blocks:1")
    assert {name.split(".")[0] for name in names} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"1"}
    whole = trainable_names(dense, "blocks:2")
    assert set(whole) - set(names) == {name for name in whole if name.startswith("blocks.0.")}


def test_patterns_take_what_matches_any_of_them(dense: nn.Module) -> None:
    names = trainable_names(dense, "blocks.?.mlp.*, head.bias")
    assert len(names) == 2 * 4 + 1
    assert all(".mlp." in name or name == "head.bias" for name in names)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("factors", 'trainable = "factors" is for factored layers, and the model has none: give "all"'),
        ("blocks:0", 'the model has 2 blocks, got "blocks:0"'),
        ("blocks:3", 'the model has 2 blocks, got "blocks:3"'),
        ("mlp", r"trainable = 'mlp' names no parameter: the model has cls_token, "),
    ],
)
def test_a_choice_that_the_model_does_not_have_is_refused(
    dense: nn.Module, chosen: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainable_names(dense, chosen)


def test_blocks_of_a_model_without_a_list_of_them_are_refused() -> None:
    model = timm.create_model("test_convnext", num_classes=5)
    with pytest.raises(
        ConfigError, match=r'ConvNeXt has no list of blocks: give name patterns as "stages.3.\*"'
    ):
        trainable_names(model, "blocks:1")


def test_a_model_without_a_classifier_has_no_head_but_blocks() -> None:
    model = TextEncoder(vocab_size=50, max_tokens=12, embed_dim=32, depth=2, num_heads=2)
    assert head_names(model) == set()
    assert len(trainable_names(model, "all")) == len(list(model.parameters()))
    assert {name.rsplit(".", 2)[0][:8] for name in trainable_names(model, "blocks:1")} == {
        "blocks.1",
        "norm"[:8],
    }
    with pytest.raises(ConfigError, match="names no parameter"):
        trainable_names(model, "head")


def test_rates_are_those_of_training(factored: nn.Module) -> None:
    names = trainable_names(factored, "all")
    rates = parameter_rates(factored, names, head=5.0)
    assert list(rates) == names
    for name, layer in subspace_layers(factored):
        assert (rates[f"{name}.left"].lr, rates[f"{name}.right"].lr) == rate_scale(layer)
    assert {rates[name].lr for name in head_names(factored)} == {5.0}
    not_decayed = {name for name in names if rates[name].decay == 0}
    assert {"pos_embed", "cls_token", "head.bias", "norm.weight"} <= not_decayed
    assert "head.weight" not in not_decayed
