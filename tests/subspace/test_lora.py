import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from wasi_export.subspace.kinds import Kind, find_kinds
from wasi_export.subspace.lora import SCALE, LoraLayer, add_lora, merge_lora

RANK = 3


@pytest.fixture(params=["vit_tiny_patch16_224", "efficientformer_l1"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Returns a model of Linear layers, and one that has 1×1 convolutions as well."""
    torch.manual_seed(0)
    if request.param == "efficientformer_l1":
        sizes = {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 24, 32)}
        return timm.create_model(request.param, num_classes=5, **sizes).eval()
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return timm.create_model(request.param, num_classes=5, **sizes).eval()


def batch(model: nn.Module) -> Tensor:
    size = 224 if "EfficientFormer" in type(model).__name__ else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def add(model: nn.Module) -> list[str]:
    found = find_kinds(model, batch(model)[:1])
    names = [name for name, kind in found.items() if isinstance(kind, Kind)]
    add_lora(model, names, RANK)
    return names


def layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def test_a_new_change_changes_nothing(model: nn.Module) -> None:
    x = batch(model)
    expected = model(x)
    names = add(model)
    assert [isinstance(model.get_submodule(name), LoraLayer) for name in names] == [True] * len(names)
    assert torch.equal(model(x), expected)


def test_a_strided_convolution_is_changed_where_it_looks() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2)), torch.randn(2, 4, 7, 8)
    add_lora(model, ["0"], RANK)
    nn.init.normal_(model[0].left)
    expected = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected)


def test_merged_changes_are_the_same_function_of_the_same_parameters(model: nn.Module) -> None:
    x, dense = batch(model), copy.deepcopy(model)
    names = add(model)
    for layer in layers(model):
        nn.init.normal_(layer.left, std=0.05)
    expected = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense(x), expected, atol=1e-3)
    before, after = dense.state_dict(), model.state_dict()
    assert {n: p.shape for n, p in after.items()} == {n: p.shape for n, p in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in names}


def test_changes_alone_are_trained_by_the_gradient_of_the_weight(model: nn.Module) -> None:
    x, dense = batch(model), copy.deepcopy(model)
    names = add(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{side}" for name in names for side in ("left", "right")
    }
    dense(x).square().sum().backward()
    model(x).square().sum().backward()
    for name in names:
        layer = model.get_submodule(name)
        expected = SCALE * dense.get_submodule(name).weight.grad.flatten(1) @ layer.right.detach().T
        torch.testing.assert_close(layer.left.grad, expected, rtol=1e-3, atol=1e-4)
