"""What can become factors is found, and what cannot is left with a reason."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from wasi_export.ranks import ActivationRanks, LayerPlan
from wasi_export.subspace.conv import SubspaceConv1x1
from wasi_export.subspace.kinds import Conv1x1Kind, Kind, LinearKind, Refusal, find_kinds, kind_of
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.probe import foreign_uses


def plan_for(kind: Kind, rank: int, **options: object) -> LayerPlan:
    sizes = {"in_features": kind.in_features, "out_features": kind.out_features}
    values = {"name": "x", "rank": rank, "method": "plain", "energy": 1.0, "reason": "for the test"}
    return LayerPlan.model_validate({**sizes, **values, **options})


def kind_for(module: nn.Module) -> Kind:
    kind = kind_of(module)
    assert isinstance(kind, Kind)
    return kind


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 9), (2, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 9, bias=False), (2, 6)),
    "linear on 4 axes": (lambda: nn.Linear(6, 9), (2, 3, 4, 6)),
    "1×1 convolution": (lambda: nn.Conv2d(6, 9, 1), (2, 6, 5, 4)),
    "1×1 convolution with a stride": (lambda: nn.Conv2d(6, 9, 1, stride=(2, 3), bias=False), (2, 6, 5, 7)),
    "1×1 convolution, padding by name": (lambda: nn.Conv2d(6, 9, 1, padding="same"), (2, 6, 5, 4)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_the_layer_is_its_matrix_on_its_rows(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(shape)
    kind = kind_for(layer)
    assert kind.weight.shape == (kind.out_features, kind.in_features) == (9, 6)
    y = F.linear(kind.rows(x), kind.weight, kind.bias)
    expected = layer(x).movedim(1, -1) if isinstance(layer, nn.Conv2d) else layer(x)
    assert torch.allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_a_full_rank_replacement_computes_the_same(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    layer, x = make(), torch.randn(shape)
    kind = kind_for(layer)
    factored = kind.empty_layer(plan_for(kind, 6))
    U, S, Vh = torch.linalg.svd(kind.weight, full_matrices=False)
    with torch.no_grad():
        factored.left.copy_(U)
        factored.right.copy_(S[:, None] * Vh)
        if kind.bias is not None:
            assert factored.bias is not None
            factored.bias.copy_(kind.bias)
    assert (factored.bias is None) == (kind.bias is None)
    assert torch.allclose(factored(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(6, 9), nn.Conv2d(6, 9, 1)])
def test_a_replacement_has_the_dtype_the_mode_and_the_activation_ranks(layer: nn.Module) -> None:
    kind = kind_for(layer.to(torch.bfloat16).eval())
    factored = kind.empty_layer(plan_for(kind, 3, activation=ActivationRanks(feature=4)))
    assert type(factored) is (SubspaceConv1x1 if isinstance(layer, nn.Conv2d) else SubspaceLinear)
    assert (factored.left.dtype, factored.training, factored.rank) == (torch.bfloat16, False, 3)
    assert factored.feature_basis is not None
    assert factored.feature_basis.shape == (6, 4)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 9), nn.Conv2d(6, 9, 1, stride=2), nn.Linear(6, 9, bias=False)], ids=str
)
def test_a_replacement_to_be_filled_is_all_set_and_draws_no_random_number(layer: nn.Module) -> None:
    """Also its bases: they are orthonormal, as is left."""
    kind, state = kind_for(layer), torch.get_rng_state()
    plan = plan_for(kind, 4, activation=ActivationRanks(feature=3, token=2, token_count=5))
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        factored = kind.empty_layer(plan)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.isfinite().all() for tensor in factored.state_dict().values())
    for columns in (factored.left, factored.feature_basis, factored.token_basis):
        assert columns is not None
        assert torch.equal(columns.T @ columns, torch.eye(columns.shape[1]))
    assert torch.equal(factored.right, factored.left.T @ kind.weight)
    assert factored.passes == 0


class Doubled(nn.Linear):
    """Computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Named(nn.Linear):
    """Computes the same."""


def replaced_forward() -> nn.Module:
    layer = nn.Linear(6, 9)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(6, 9)
    layer.register_forward_hook(lambda *_: None)
    return layer


def quantized() -> nn.Module:
    layer = nn.Linear(6, 9)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int]]] = {
    "k×k convolution": (
        lambda: nn.Conv2d(6, 9, (3, 1)), "3×1 convolution, only 1×1 are factored", (9, 18),
    ),
    "depthwise convolution": (lambda: nn.Conv2d(6, 6, 1, groups=6), "depthwise convolution", (6, 1)),
    "grouped convolution": (lambda: nn.Conv2d(6, 9, 1, groups=3), "grouped convolution", (9, 2)),
    "padded 1×1 convolution": (
        lambda: nn.Conv2d(6, 9, 1, padding=1), r"1×1 convolution with padding \(1, 1\)", (9, 6),
    ),
    "convolution over 1 axis": (lambda: nn.Conv1d(6, 9, 1), "Conv1d has no factored form", (9, 6)),
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(6, 9, 1), "ConvTranspose2d has no factored form", (6, 9),
    ),
    "another forward": (lambda: Doubled(6, 9), r"Doubled has a forward pass", (9, 6)),
    "another forward on the instance": (replaced_forward, r"Linear has a forward pass of its own", (9, 6)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 9)), "weight is computed", (9, 6)),
    "a parametrisation": (quantized, "weight is computed", (9, 6)),
    "pruning": (lambda: prune.random_unstructured(nn.Linear(6, 9), "weight", 2), "is computed", (9, 6)),
    "a hook": (hooked, "it has hooks, which would be lost", (9, 6)),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason", "sizes"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_factored_has_a_reason_and_a_dense_plan(
    make: Callable[[], nn.Module], reason: str, sizes: tuple[int, int]
) -> None:
    module = make()
    refusal = kind_of(module)
    assert isinstance(refusal, Refusal)
    plan = refusal.plan("blocks.0.x")
    assert plan.rank is None
    assert plan.reason.startswith("dense: ")
    assert re.search(reason, plan.reason)
    assert (plan.out_features, plan.in_features) == sizes


def test_a_subclass_that_computes_the_same_is_taken() -> None:
    assert isinstance(kind_of(Named(6, 9)), LinearKind)


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.Embedding(6, 9), nn.Sequential(), nn.BatchNorm2d(6)])
def test_a_module_without_a_matrix_is_neither_taken_nor_refused(module: nn.Module) -> None:
    assert kind_of(module) is None


class Block(nn.Module):
    """Uses its layers in every way that a model may."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.asked, self.unused, self.conv = nn.Linear(6, 6), nn.Linear(6, 6), nn.Conv2d(3, 6, 1)
        self.listed = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(6))
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.called(self.conv(images).flatten(2).mT)
        x = F.linear(x, self.read.weight, self.bias)
        x = self.both(x) + self.both.weight.sum()
        x = self.asked(x.to(self.asked.weight.dtype))
        x = F.linear(x, torch.cat([self.listed.weight, self.listed.weight]))
        x, _ = self.attention(x[..., :6], x[..., :6], x[..., :6])
        return self.drop(x)


def images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def reasons(model: nn.Module, x: Tensor | None) -> dict[str, str]:
    kinds = find_kinds(model, x)
    return {name: kind.reason for name, kind in kinds.items() if isinstance(kind, Refusal)}


def test_a_weight_that_is_used_outside_of_its_layer_is_refused() -> None:
    found = reasons(Block(), images())
    assert found == {
        "read": "its weight is used outside of it, by torch.nn.functional.linear",
        "both": "its weight is used outside of it, by torch.Tensor.sum",
        "asked": "its weight is used outside of it, by torch.Tensor.dtype.__get__",
        "unused": "it is never called",
        "listed": "its weight is used outside of it, by torch.cat",
        "attention.out_proj": found["attention.out_proj"],
    }
    assert "multi_head_attention" in found["attention.out_proj"]


def test_the_rest_of_such_a_model_is_taken() -> None:
    kinds = find_kinds(Block(), images())
    assert isinstance(kinds["called"], LinearKind)
    assert isinstance(kinds["conv"], Conv1x1Kind)


def test_without_images_only_what_the_modules_say_is_known() -> None:
    assert reasons(Block(), None) == {}


def test_a_refused_layer_could_not_have_been_replaced() -> None:
    """The guard is needed: what the probe refuses fails, or is another model, once replaced."""
    for name in ("read", "both", "asked", "listed"):
        model = Block()
        kind = kind_for(model.get_submodule(name))
        model.set_submodule(name, kind.empty_layer(plan_for(kind, 2)))
        with pytest.raises(AttributeError, match="weight"):
            model(images())


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = Block().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    find_kinds(model, images())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failing_model_is_left_without_hooks() -> None:
    model = Block()
    with pytest.raises(RuntimeError):
        foreign_uses(model, {"called": model.called}, torch.randn(2, 4, 4, 4))
    assert not model.called._forward_hooks


class Tied(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 6)
        self.first, self.second, self.free = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.first.weight = self.embed.weight
        self.second.bias = self.first.bias
        self.once = nn.Linear(6, 6)
        self.again = self.once


def test_shared_parameters_are_refused_with_the_other_name() -> None:
    assert reasons(Tied(), None) == {
        "first": "it shares a parameter with embed.weight",
        "second": "it shares a parameter with first.bias",
        "once": "it shares a parameter with again.weight",
    }
