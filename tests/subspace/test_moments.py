"""Second moments do not depend on how the data came."""

import torch
from torch import Tensor, nn

from wasi_export.subspace.moments import InputMoments, PrincipalAxes, collect_moments


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(0))


def test_the_moment_is_the_sum_over_tokens_whatever_the_batches() -> None:
    layer, x = nn.Linear(4, 3), images()
    whole = collect_moments(layer, {"fc": layer}, [x], total=1)["fc"]
    parts = collect_moments(layer, {"fc": layer}, x.split([1, 4, 1]), total=3)["fc"]
    flat = x.reshape(-1, 4).double()
    assert whole.feature is not None
    assert whole.token is not None
    assert torch.allclose(whole.feature, flat.T @ flat, rtol=1e-5)
    assert torch.allclose(whole.token, torch.einsum("bni,bmi->nm", x, x).double(), rtol=1e-5, atol=1e-5)
    assert parts.feature is not None
    assert torch.allclose(whole.feature, parts.feature, rtol=1e-5, atol=1e-5)


def test_the_model_keeps_its_mode_and_carries_no_hooks_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    collect_moments(model, {"0": model[0]}, [images()], total=1)
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_token_moments_are_dropped_when_the_token_count_changes() -> None:
    moments = InputMoments()
    for tokens in (5, 6, 6):
        moments.add(torch.ones(2, tokens, 4))
    assert moments.token is None
    assert moments.token_count is None
    assert moments.feature is not None


def test_a_four_dimensional_input_has_feature_moments_only() -> None:
    moments = InputMoments()
    moments.add(torch.ones(2, 3, 3, 4))
    assert moments.feature is not None
    assert moments.feature.shape == (4, 4)
    assert moments.token is None


def test_principal_axes_come_largest_first() -> None:
    axes = PrincipalAxes.of(torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64)))
    assert axes is not None
    assert axes.values.tolist() == [9.0, 4.0, 1.0]
    assert axes.vectors[:, 0].abs().tolist() == [0.0, 1.0, 0.0]
