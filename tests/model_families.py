"""Models of many families, small and with random parameters, each with the opset that it is exported with."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from wasi_export.config import SubspaceConfig
from wasi_export.manifest import InputSpec
from wasi_export.ranks import Plan
from wasi_export.subspace.inject import factorize_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 5}
SWIN = {"img_size": 56, "embed_dim": 96, "depths": (2, 1), "num_heads": (3, 6), "num_classes": 5}

FAMILIES: dict[str, tuple[str, Mapping[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", TINY, 23),
    "vit, decomposed attention": ("vit_tiny_patch16_224", TINY, 20),
    "vit, decomposed attention and gelu": ("vit_tiny_patch16_224", TINY, 17),
    "vit, newest operators": ("vit_tiny_patch16_224", TINY, 25),
    "layer scale, as deit3": ("deit3_small_patch16_224", {**TINY, "init_values": 0.1}, 23),
    "average pooling": ("vit_tiny_patch16_224", {**TINY, "global_pool": "avg"}, 23),
    "registers": ("vit_tiny_patch16_224", {**TINY, "reg_tokens": 3}, 23),
    "normalised q and k": ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}, 23),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY, 23),
    "windows, 4-D activations": ("swin_tiny_patch4_window7_224", SWIN, 23),
    "windows at opset 18": ("swin_tiny_patch4_window7_224", SWIN, 18),
    "relative positions": ("beit_base_patch16_224", TINY, 23),
    "convolutions": ("resnet10t", {"num_classes": 5}, 23),
}
UNFACTORED = {
    "relative positions",
    "convolutions",
}  # BEiT reads qkv.weight itself; a ResNet has no such layer


def spec_for(size: int) -> InputSpec:
    return InputSpec(height=size, width=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def make_model(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Returns a model whose parameters are all random, so that each shows in the output."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **arguments)
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Gives parameters that are zeros or ones at first random values, in place."""
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_((0.5 if key.endswith("weight") else 0.0) + 0.3 * torch.rand(len(parameter)))
        elif not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape))


def factor(model: nn.Module) -> Plan:
    config = SubspaceConfig(method="plain", fraction=0.4, activation="none")
    return factorize_model(model, [], config, total=0)
