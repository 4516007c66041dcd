"""Ranks for models with random weights, on which memory and time do not depend.

Ranks of pairs follow from the fraction. Those of saved inputs are the mean shares, of the input's features
and of its tokens, that keep 95 % of the energy in a real ViT-S/14 on Fashion-MNIST: 0.26 and 0.65 of qkv's,
0.20 and 0.42 of proj's, 0.28 and 0.61 of fc1's, 0.18 and 0.69 of fc2's.
"""

from functools import cache, partial

import torch
from torch import nn

from wasi_export.config import ActivationMode, ModelConfig
from wasi_export.ranks import RANK_FLOOR, ActivationRanks, LayerPlan, Plan, break_even_rank, round_rank
from wasi_export.subspace.moments import MOST_TOKENS
from wasi_export.training.models import create_model

SHARES = {"qkv": (0.26, 0.65), "proj": (0.20, 0.42), "fc1": (0.28, 0.61), "fc2": (0.18, 0.69)}
"""Of features and of tokens, by the last part of a layer's name."""
CLASSES = 100


@cache
def make_plan(model: str, fraction: float, *, mode: ActivationMode, size: int) -> Plan:
    """Returns the ranks that `subspace.fraction` gives the targeted layers of a model.

    Args:
        model: timm's name; its Linear layers are named as in `SHARES`.
        fraction: of the parameters of a layer.
        mode: how inputs are kept.
        size: height and width of the images.
    """
    return Plan(
        activation_mode=mode,
        layers=tuple(
            LayerPlan(
                name=name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                rank=_rank(linear, fraction),
                method="plain",
                energy=None,
                activation=_activation(name, linear, mode, tokens),
                tokens=tokens,
                reason=f"fraction {fraction:g}",
            )
            for name, linear, tokens in _targets(model, size)
        ),
    )


def _rank(linear: nn.Linear, fraction: float) -> int | None:
    """Returns the rank of a pair, None where the smallest one is no gain."""
    most = break_even_rank(linear.out_features, linear.in_features)
    return None if most <= RANK_FLOOR else min(round_rank(fraction * most), round_rank(most - 1))


def _activation(name: str, linear: nn.Linear, mode: ActivationMode, tokens: int) -> ActivationRanks:
    feature, token = SHARES[_last(name)]
    if mode == "none":
        return ActivationRanks()
    ranks = ActivationRanks(feature=round(feature * linear.in_features))
    if mode == "feature" or tokens > MOST_TOKENS:
        return ranks
    return ranks.model_copy(update={"token": round(token * tokens), "token_count": tokens})


def _targets(model: str, size: int) -> list[tuple[str, nn.Linear, int]]:
    """Returns the targeted layers, with the tokens of a sample of their input."""
    found: list[tuple[str, nn.Linear, int]] = []

    def see(name: str, linear: nn.Linear, args: tuple[torch.Tensor]) -> None:
        found.append((name, linear, args[0][0].numel() // linear.in_features))

    with torch.device("meta"):
        built = create_model(ModelConfig(name=model, img_size=size), CLASSES)
        for name, module in built.named_modules():
            if type(module) is nn.Linear and _last(name) in SHARES:
                module.register_forward_pre_hook(partial(see, name))
        built(torch.zeros(1, 3, size, size))
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]
