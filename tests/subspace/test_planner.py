"""What is measured of a model, and that a plan made from it is the one that factoring makes."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from wasi_export.config import SubspaceConfig
from wasi_export.errors import ConfigError, NothingToCheckError, RankError, UnsupportedModelError
from wasi_export.ranks import Plan
from wasi_export.subspace.inject import factorize_model
from wasi_export.subspace.planner import MeasuredModel, decide, measure_layers

UNIFORM = SubspaceConfig(fraction=0.6, activation="feature+token")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=128, num_heads=2, num_classes=10
    )


def images() -> list[torch.Tensor]:
    return list(torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def measured_by(model: nn.Module, config: SubspaceConfig) -> MeasuredModel:
    return measure_layers(model, images(), config, total=2)


@pytest.mark.parametrize("method", ["whitened", "plain"])
def test_the_plan_is_that_of_factorisation_and_the_model_stays_dense(model: nn.Module, method: str) -> None:
    config = UNIFORM.model_copy(update={"method": method})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = decide(measured_by(model, config), config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    copy = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=128, num_heads=2, num_classes=10
    )
    copy.load_state_dict(before)
    factored = factorize_model(copy, images(), config, total=2)
    for planned, done in zip(made.layers, factored.layers, strict=True):
        for field in ("name", "rank", "method", "activation"):
            assert getattr(planned, field) == getattr(done, field)
        assert planned.energy == (None if done.energy is None else pytest.approx(done.energy, abs=1e-9))


def test_totals_of_the_plan_are_those_of_the_factored_model(model: nn.Module) -> None:
    measured = measured_by(model, UNIFORM)
    plan = decide(measured, UNIFORM)
    copy = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=128, num_heads=2, num_classes=10
    )
    factorize_model(copy, images(), UNIFORM, total=2)
    parameters = measured.rest.parameters + _parameters(plan)
    assert parameters == sum(parameter.numel() for parameter in copy.parameters())
    assert {layer.tokens for layer in plan.factored} == {17}


def _parameters(plan: Plan) -> int:
    """Returns those of the weights that could be factored."""
    return sum(layer.parameters for layer in plan.layers if layer.tokens is not None)


@pytest.mark.parametrize(
    ("made_for", "used_for", "difference"),
    [
        ("blocks.*.mlp.*", "blocks.*", r"it lacks blocks\.0\.attn\.qkv, .*\(4\): set"),
        ("blocks.*", "blocks.*.mlp.*", r"it also has blocks\.0\.attn\.qkv, .*\(4\): set"),
        (
            "blocks.0.*",
            "blocks.1.*",
            r"it lacks blocks\.1.*, … \(4\); it also has blocks\.0.*, … \(4\): set",
        ),
    ],
)
def test_a_plan_of_other_layers_is_refused(
    model: nn.Module, tmp_path: Path, made_for: str, used_for: str, difference: str
) -> None:
    config = SubspaceConfig(include=(made_for,), rank=8)
    path = tmp_path / "plan.json"
    path.write_text(decide(measured_by(model, config), config).model_dump_json())
    other = SubspaceConfig(include=(used_for,), plan=path)
    with pytest.raises(ConfigError, match=f"plan.json is not a plan of the layers .*: {difference}"):
        decide(measured_by(model, other), other)


def test_a_budget_of_parameters_is_kept_by_the_model_as_a_whole(model: nn.Module) -> None:
    config = SubspaceConfig(allocation="output_error", max_params=300_000)
    measured = measured_by(model, config)
    plan = decide(measured, config)
    total = measured.rest.parameters + _parameters(plan)
    assert 0.97 * 300_000 < total <= 300_000
    assert sum(layer.error or 0 for layer in plan.layers) > 0


def test_a_budget_below_what_the_model_can_have_names_the_smallest(model: nn.Module) -> None:
    config = SubspaceConfig(allocation="output_error", max_params=1000)
    measured = measured_by(model, config)
    smallest = measured.rest.parameters + 2 * 32 * (128 + 384 + 128 + 128 + 2 * (128 + 512))
    with pytest.raises(RankError, match=f"at least {smallest:,} parameters are needed, got 1,000"):
        decide(measured, config)


@pytest.mark.parametrize("allocation", ["uniform", "output_error"])
def test_a_model_without_a_layer_that_can_be_factored_is_refused_whatever_the_allocation(
    allocation: str,
) -> None:
    config = SubspaceConfig.model_validate({"allocation": allocation})
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    message = r"no layer that can be factored matches \*: 0 is not, 3×3 convolution.*: set subspace\.include"
    with pytest.raises(UnsupportedModelError, match=message):
        measured_by(model, config)


def test_without_calibration_images_nothing_is_planned(model: nn.Module) -> None:
    with pytest.raises(NothingToCheckError, match="no calibration images"):
        measure_layers(model, [], UNIFORM, total=0)
