"""Factored layers inside a real timm transformer."""

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from wasi_export.config import SubspaceConfig
from wasi_export.cost import saved_input_bytes
from wasi_export.errors import ConfigError, RankError, UnsupportedModelError
from wasi_export.ranks import Plan
from wasi_export.subspace import SubspaceLinear, factorize_model, install_layers, subspace_layers
from wasi_export.subspace.conv import SubspaceConv1x1
from wasi_export.subspace.inject import fold_layers

WIDTH, TOKENS = 64, 17


def make_vit(*, seed: int = 0, embed_dim: int = WIDTH) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": embed_dim, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).eval()


@pytest.fixture
def vit() -> nn.Module:
    return make_vit()


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def factorize(model: nn.Module, **options: object) -> Plan:
    config = SubspaceConfig.model_validate({"rank": 16, **options})
    return factorize_model(model, images().split(4), config, total=3)


def test_every_targeted_linear_of_every_block_becomes_factors(vit: nn.Module) -> None:
    plan = factorize(vit)
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = [f"blocks.{i}.{kind}" for i in range(2) for kind in kinds]
    assert [name for name, _ in subspace_layers(vit)] == expected
    assert [layer.name for layer in plan.factored] == expected
    assert type(vit.get_submodule("head")) is nn.Linear


def test_patterns_choose_the_layers(vit: nn.Module) -> None:
    plan = factorize(vit, include=["*mlp.*"], exclude=["blocks.1.*"])
    assert [layer.name for layer in plan.layers] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


@pytest.mark.parametrize("method", ["plain", "whitened"])
def test_a_higher_rank_keeps_the_logits_closer(vit: nn.Module, method: str) -> None:
    errors = []
    for rank in (8, 16, 31):
        model = copy.deepcopy(vit)
        factorize(model, rank=rank, method=method)
        with torch.no_grad():
            errors.append((model(images()) - vit(images())).norm().item())
    assert errors == sorted(errors, reverse=True)


def test_whitened_keeps_the_features_better_than_plain() -> None:
    errors = {}
    for method in ("plain", "whitened"):
        model = make_vit()
        with torch.no_grad():
            reference = model.forward_features(images())
            factorize(model, method=method)
            errors[method] = (model.forward_features(images()) - reference).norm().item()
    assert errors["whitened"] < errors["plain"]


def test_the_parameter_count_is_that_of_the_formula(vit: nn.Module) -> None:
    before = sum(p.numel() for p in vit.parameters())
    plan = factorize(vit)
    saved = sum(layer.in_features * layer.out_features - layer.parameters for layer in plan.layers)
    assert sum(p.numel() for p in vit.parameters()) == before - saved


def test_a_layer_at_break_even_stays_dense_and_says_why(vit: nn.Module) -> None:
    plan = factorize(vit, rank=32)  # break-even of 64x64 is 32
    projections = [layer for layer in plan.layers if layer.name.endswith("attn.proj")]
    assert [layer.rank for layer in projections] == [None, None]
    assert all(layer.reason.startswith("dense: rank 32 is not below break-even 32") for layer in projections)
    assert type(vit.get_submodule("blocks.0.attn.proj")) is nn.Linear


def test_activation_ranks_are_planned_by_energy(vit: nn.Module) -> None:
    plan = factorize(vit, activation="feature+token", activation_epsilon=0.9)
    for layer in plan.factored:
        assert layer.activation.feature is not None
        assert 1 <= layer.activation.feature < layer.in_features
        assert layer.activation.token is not None
        assert 1 <= layer.activation.token < TOKENS
        assert layer.activation.token_count == TOKENS


def test_a_budget_of_activations_is_for_the_batch_that_is_told(vit: nn.Module) -> None:
    config = SubspaceConfig(rank=16, method="whitened", sensitivity="none", activation_memory_mb=0.1)
    with pytest.raises(ConfigError, match="give the batch_size"):
        factorize_model(make_vit(), images().split(4), config, total=3)
    plan = factorize_model(vit, images().split(4), config, total=3, batch_size=8)
    saved = sum(
        saved_input_bytes(layer.in_features, layer.activation, batch=8, tokens=TOKENS)
        for layer in plan.factored
    )
    assert 0.08e6 < saved <= 0.1e6


def test_the_starting_basis_is_that_of_the_calibration_data(vit: nn.Module) -> None:
    factorize(vit, activation_epsilon=0.9)
    layer = vit.get_submodule("blocks.0.attn.qkv")
    assert isinstance(layer, SubspaceLinear)
    basis, kept = layer.feature_basis, 0.0
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        vit(images())
    assert basis is not None
    kept = ((seen[0] @ basis).norm() / seen[0].norm()).item() ** 2
    assert kept >= 0.9 - 1e-4


def test_a_trained_state_loads_strictly_into_a_model_with_installed_layers(vit: nn.Module) -> None:
    plan = factorize(vit, activation="feature+token")
    other = make_vit(seed=7)
    install_layers(other, Plan.model_validate_json(plan.model_dump_json()))
    other.load_state_dict(vit.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(vit(images()), other(images()))


def test_folded_factors_are_the_dense_layers_of_the_same_function(vit: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, stride=2), nn.Upsample(scale_factor=2), vit)
    factorize(model, rank=None, fraction=0.9, include=["0", "2.blocks.0.*", "2.blocks.1.mlp.*"])
    model.set_submodule("0", SubspaceConv1x1(3, 3, 2, stride=(2, 2)))
    before = model(images())
    fold_layers(model, [name for name, _ in subspace_layers(model)][:-1])
    assert [name for name, _ in subspace_layers(model)] == ["2.blocks.1.mlp.fc2"]
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(images()), before)


def test_a_plan_for_another_model_is_refused(vit: nn.Module) -> None:
    plan = factorize(vit)
    other = make_vit(embed_dim=32)
    with pytest.raises(UnsupportedModelError, match=r"the plan factors blocks\.0\.attn\.qkv \(192×64\)"):
        install_layers(other, plan)


def test_plain_factors_without_compression_read_no_data(vit: nn.Module) -> None:
    def unread() -> Iterator[Tensor]:
        raise AssertionError("calibration data was read")
        yield

    config = SubspaceConfig.model_validate({"method": "plain", "rank": 16, "activation": "none"})
    factorize_model(vit, unread(), config, total=0)


def test_a_model_without_matching_layers_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"no layer that can be factored matches no\.such; the model has 1, 2"
    ):
        factorize(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Linear(4, 4)), include=["no.such"])


def test_a_rank_above_full_rank_is_refused(vit: nn.Module) -> None:
    with pytest.raises(RankError, match="rank 65 is above 64"):
        factorize(vit, rank=65)
