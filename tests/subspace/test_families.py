"""Model families from factors to a checked file: what can be factored is, the rest stays and says why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from model_families import randomise
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from wasi_export.artifact import Golden
from wasi_export.config import SubspaceConfig, TrainConfig
from wasi_export.converters.check import check_factors
from wasi_export.converters.inference import export_inference, reference_outputs
from wasi_export.manifest import InputSpec
from wasi_export.ranks import Plan
from wasi_export.runtimes.parity import measure_parity, require_parity
from wasi_export.subspace.conv import SubspaceConv1x1
from wasi_export.subspace.factorize import whitened_spectrum
from wasi_export.subspace.inject import factorize_model, install_layers, subspace_layers
from wasi_export.subspace.moments import InputMoments, PrincipalAxes
from wasi_export.training.optim import create_optimizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
TINY_14 = {"img_size": 28, "embed_dim": 96, "depth": 2, "num_heads": 3}
READ = "dense: its weight is used outside of it, by torch.nn.functional.linear"


def timm_model(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **arguments)


@dataclass(frozen=True)
class Family:
    """A small model of a family, and what must and must not be factored in it."""

    make: Callable[[], nn.Module]
    size: int
    factored: tuple[str, ...]
    """Names of layers, one for each kind of place."""
    refused: Mapping[str, str]
    """Names of layers, and how their reasons begin."""
    parity: float = 1e-5


FAMILIES = {
    "vit": Family(
        timm_model("vit_tiny_patch16_224", **TINY),
        32,
        ("blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"),
        {"patch_embed.proj": "dense: 8×8 convolution"},
    ),
    "deit3, layer scale": Family(
        timm_model("deit3_small_patch16_224", **TINY), 32, ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"), {}
    ),
    "dinov2 with registers": Family(
        timm_model("vit_small_patch14_reg4_dinov2", **TINY_14),
        28,
        ("blocks.0.attn.qkv", "blocks.1.mlp.fc1"),
        {},
    ),
    "dinov2, packed swiglu": Family(
        timm_model("vit_giant_patch14_reg4_dinov2", **TINY_14),
        28,
        ("blocks.0.mlp.fc1", "blocks.1.mlp.fc2"),
        {},
    ),
    "eva02, split q, k and v, swiglu, rotary positions": Family(
        timm_model("eva02_base_patch14_224", **TINY_14),
        28,
        (
            "blocks.0.attn.q_proj",
            "blocks.0.attn.k_proj",
            "blocks.0.attn.v_proj",
            "blocks.1.attn.proj",
            "blocks.0.mlp.fc1_g",
            "blocks.0.mlp.fc1_x",
            "blocks.1.mlp.fc2",
        ),
        {},
    ),
    "eva, fused qkv with a bias of parts": Family(
        timm_model("eva_giant_patch14_224", **TINY_14),
        28,
        ("blocks.0.attn.proj", "blocks.1.mlp.fc1"),
        {"blocks.0.attn.qkv": READ},
    ),
    "beit": Family(
        timm_model("beit_base_patch16_224", **TINY),
        32,
        ("blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"),
        {"blocks.0.attn.qkv": READ, "blocks.1.attn.qkv": READ},
    ),
    "cait, class attention": Family(
        timm_model("cait_xxs24_224", **TINY), 32, ("blocks.0.attn.qkv", "blocks_token_only.0.attn.k"), {}
    ),
    "swin": Family(
        timm_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=96, depths=(2, 2), num_heads=(3, 6)
        ),
        56,
        ("layers.0.blocks.0.attn.qkv", "layers.0.blocks.1.mlp.fc1", "layers.1.downsample.reduction"),
        {},
    ),
    "mixer": Family(
        lambda: MlpMixer(num_classes=5, img_size=64, patch_size=8, num_blocks=2, embed_dim=192),
        64,
        ("blocks.0.mlp_tokens.fc1", "blocks.0.mlp_channels.fc1", "blocks.1.mlp_channels.fc2"),
        {"stem.proj": "dense: 8×8 convolution"},
    ),
    "convnext": Family(
        timm_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(64, 96, 128, 160)),
        64,
        ("stages.0.blocks.0.mlp.fc1", "stages.3.blocks.0.mlp.fc2"),
        {
            "stages.0.blocks.0.conv_dw": "dense: depthwise convolution",
            "stages.1.downsample.1": "dense: 2×2 convolution",
        },
    ),
    "convnext of 1×1 convolutions": Family(
        timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(64, 96, 128, 160)),
        64,
        ("stages.0.blocks.0.mlp.fc1", "stages.3.blocks.0.mlp.fc2"),
        {},
    ),
    "mobilevit": Family(
        timm_model("mobilevit_xs"),
        64,
        (
            "stages.2.1.transformer.0.attn.qkv",
            "stages.2.1.transformer.0.mlp.fc2",
            "stages.2.1.conv_proj.conv",
            "stages.3.0.conv1_1x1.conv",
            "final_conv.conv",
        ),
        {
            "stages.2.1.conv_kxk.conv": "dense: 3×3 convolution",
            "stages.2.0.conv2_kxk.conv": "dense: depthwise",
        },
    ),
    "efficientformer": Family(
        timm_model("efficientformer_l1", depths=(1, 1, 1, 2), embed_dims=(48, 64, 96, 128)),
        224,
        (
            "stages.0.blocks.0.mlp.fc1",
            "stages.2.blocks.0.mlp.fc2",
            "stages.3.blocks.2.token_mixer.qkv",
            "stages.3.blocks.2.mlp.fc1",
        ),
        {"stages.1.downsample.conv": "dense: 3×3 convolution"},
    ),
    "edgenext, asks a weight for its device": Family(
        timm_model("edgenext_xx_small"),
        64,
        ("stages.1.blocks.1.mlp.fc1",),
        {"stages.1.blocks.1.pos_embd.token_projection": "dense: its weight is used outside of it"},
    ),
}


def make_random(family: Family) -> nn.Module:
    """Returns the model with parameters and statistics that all show in the output."""
    torch.manual_seed(0)
    model = family.make()
    randomise(model)
    return model


def batch(size: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


CONFIG = SubspaceConfig(
    method="whitened",
    sensitivity="none",
    fraction=0.4,
    exclude=("head*",),
    activation="feature",
    activation_epsilon=0.9,
)


def train_one_step(model: nn.Module, images: Tensor) -> float:
    """Takes a step, in place; returns the loss before it."""
    model.train()
    optimizer = create_optimizer(model, TrainConfig(lr=1e-3))
    loss = F.cross_entropy(model(images), torch.arange(len(images)) % 5)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_family_is_factored_trained_exported_and_the_same(family: Family, tmp_path: Path) -> None:
    model, images = make_random(family), batch(family.size)
    plan = factorize_model(model, [images], CONFIG, total=1)
    layers = dict(subspace_layers(model))
    assert set(family.factored) <= layers.keys() == {layer.name for layer in plan.factored}
    reasons = {layer.name: layer.reason for layer in plan.layers if layer.rank is None}
    for name, reason in family.refused.items():
        assert reasons[name].startswith(reason)

    before = {
        name: (layer.left.detach().clone(), layer.right.detach().clone()) for name, layer in layers.items()
    }
    assert np.isfinite(train_one_step(model, images))
    for name, layer in layers.items():
        assert not torch.equal(layer.left, before[name][0]), name
        assert not torch.equal(layer.right, before[name][1]), name

    spec = InputSpec(height=family.size, width=family.size, mean=(0.5,) * 3, std=(0.5,) * 3)
    graph = export_inference(model, spec, opset=23)
    check_factors(graph, plan)
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    golden = Golden(images.numpy(), reference_outputs(model, images.numpy()), np.zeros(len(images), np.int64))
    require_parity(measure_parity(path, golden), family.parity)


@pytest.mark.parametrize("name", ["mobilevit", "efficientformer"])
def test_a_trained_state_loads_strictly_into_a_new_model_with_the_same_layers(name: str) -> None:
    family = FAMILIES[name]
    model, images = make_random(family), batch(family.size)
    plan = factorize_model(model, [images], CONFIG, total=1)
    train_one_step(model, images)
    assert any(isinstance(layer, SubspaceConv1x1) for _, layer in subspace_layers(model))
    other = family.make()
    install_layers(other, Plan.model_validate_json(plan.model_dump_json()))
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other.eval()(images))


def test_four_axes_are_whitened_as_rows() -> None:
    """Skewed inputs (B, H, W, C) as a Swin has them: whitening must see the channels of all pixels."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 24)
    scales = 2.0 ** -torch.arange(32.0)[torch.randperm(32)] / 4
    x = torch.randn(6, 7, 7, 32) * scales
    moments = InputMoments()
    for part in x.split(2):
        moments.add(part)
    errors = []
    for axes in (PrincipalAxes.of(moments.feature), PrincipalAxes.of(torch.eye(32, dtype=torch.float64))):
        left = whitened_spectrum(layer.weight.detach(), axes).basis[:, :8].float()
        errors.append(((x @ layer.weight.T @ left @ left.T) - x @ layer.weight.T).norm().item())
    whitened, plain = errors
    assert whitened < 0.1 * plain
    best = torch.linalg.svdvals((x @ layer.weight.T).reshape(-1, 24))[8:].norm().item()
    assert whitened == pytest.approx(best, rel=1e-3)
