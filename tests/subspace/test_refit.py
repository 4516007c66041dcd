"""Sequentially fitted factors, against least squares by other means and against fits of each layer alone."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from wasi_export.config import SubspaceConfig
from wasi_export.errors import UnsupportedModelError
from wasi_export.subspace import SubspaceLinear, factorize_model
from wasi_export.subspace.kinds import LinearKind
from wasi_export.subspace.refit import Streams, fit_pair, refit_layers


def rows(count: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator)


def weighted_error(weight: Tensor, pair: Tensor, x: Tensor, seen: Tensor, directions: Tensor) -> float:
    return float(((x.double() @ weight.double().T - seen.double() @ pair.T) @ directions).norm())


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_pair_near_the_fitted_one_is_better(rank: int) -> None:
    weight, x = rows(9, 7, 0), rows(200, 7, 1)
    seen = x + 0.3 * rows(200, 7, 2)
    gradients = (rows(50, 9, 3).T @ rows(50, 9, 3)).double()
    floor = 0.05 * gradients.diagonal().mean() * torch.eye(9)
    directions = torch.linalg.cholesky(gradients + floor)
    left, right = fit_pair(weight, Streams.of(x, seen), rank, gradients=gradients, ridge=1e-12)
    best = weighted_error(weight, left @ right, x, seen, directions)
    for seed in range(20):
        moved = left + 1e-3 * rows(9, rank, seed), right + 1e-3 * rows(rank, 7, 100 + seed)
        assert weighted_error(weight, moved[0] @ moved[1], x, seen, directions) >= best * (1 - 1e-9)


def test_left_is_orthonormal_with_and_without_gradients() -> None:
    x = rows(100, 6, 0)
    gradients = (rows(30, 8, 1).T @ rows(30, 8, 1)).double()
    for given in (None, gradients):
        left, _ = fit_pair(rows(8, 6, 2), Streams.of(x, x), 3, gradients=given)
        assert torch.allclose(left.T @ left, torch.eye(3).double(), atol=1e-10)


def test_at_full_rank_and_with_the_same_inputs_the_weight_comes_back() -> None:
    weight, x = rows(8, 6, 0), rows(100, 6, 1)
    left, right = fit_pair(weight, Streams.of(x, x), 6)
    assert torch.allclose(left @ right, weight.double(), atol=1e-5)


def test_inputs_that_say_nothing_leave_the_weight() -> None:
    weight, x = rows(8, 6, 0), torch.zeros(10, 6)
    x[:, 0] = 1.0
    left, right = fit_pair(weight, Streams.of(x, x), 6)
    assert torch.allclose(left @ right, weight.double(), atol=1e-5)


def make_vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    return model


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def feature_error(method: str) -> float:
    dense = make_vit()
    factored = copy.deepcopy(dense)
    config = SubspaceConfig.model_validate({"method": method, "rank": 24, "activation": "none"})
    factorize_model(factored, [images(96)], config, total=1)
    unseen = images(32, seed=2)
    with torch.no_grad():
        wanted = dense.forward_features(unseen)
        return float((factored.forward_features(unseen) - wanted).norm() / wanted.norm())


def test_fitting_in_sequence_keeps_the_features_better_than_each_layer_alone() -> None:
    assert feature_error("sequential") < feature_error("whitened")


def test_the_dense_stream_is_the_dense_model_and_the_model_is_left_as_it_was_but_for_the_layers() -> None:
    model = make_vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items() if ".mlp." not in name}
    config = SubspaceConfig.model_validate({"rank": 24, "include": ["*mlp.*"]})
    factorize_model(model, [images(8)], config, total=1)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.training
    assert {type(block.mlp.fc1) for block in model.blocks} == {SubspaceLinear}


def test_the_last_bias_takes_up_the_mean_error() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    layers = {name: SubspaceLinear(*sizes, 2) for name, sizes in (("0", (6, 8)), ("2", (8, 5)))}
    dense, x = copy.deepcopy(model), rows(64, 6, 0)
    pairs = {name: (LinearKind(model.get_submodule(name)), layer) for name, layer in layers.items()}
    refit_layers(model, pairs, x, gradients={})
    with torch.no_grad():
        assert torch.allclose(model(x).mean(0), dense(x).mean(0), atol=1e-4)


class Mixing(nn.Module):
    """Adds the mean of the batch before its layer, counting from the second sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + x.cumsum(0))


def test_a_model_that_mixes_samples_is_refused_and_left_with_its_layers() -> None:
    model = Mixing()
    pairs = {"fc": (LinearKind(model.fc), SubspaceLinear(6, 6, 2))}
    with pytest.raises(
        UnsupportedModelError, match=r'fc gets inputs that mix .*subspace\.method = "whitened"'
    ):
        refit_layers(model, pairs, rows(8, 6, 0), gradients={})
    assert type(model.fc) is nn.Linear
