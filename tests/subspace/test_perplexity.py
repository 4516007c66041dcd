"""The paper's search for activation ranks: what it measures, and that its choice keeps the budget."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wasi_export.errors import RankError
from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.kinds import LinearKind
from wasi_export.subspace.perplexity import PerplexityPoint, choose_activations, measure_perplexity

EPSILONS = (0.4, 0.7, 0.95, 1.0)


class TwoLayers(nn.Module):
    """Tokens through two Linear layers to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x))).mean(1)


@pytest.fixture
def model() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers().train()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6, 12) * torch.logspace(0, -2, 12), torch.randint(4, (8,))


def points_of(
    model: TwoLayers, batch: tuple[torch.Tensor, torch.Tensor], mode: str = "feature"
) -> dict[str, tuple[PerplexityPoint, ...]]:
    x, labels = batch
    layers = {"fc1": LinearKind(model.fc1), "fc2": LinearKind(model.fc2)}
    loss = lambda logits: F.cross_entropy(logits, labels)  # noqa: E731
    return measure_perplexity(model, layers, x, loss, mode=mode, batch_size=8, epsilons=EPSILONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["feature", "feature+token"])
def test_the_gradient_error_falls_with_epsilon_and_the_bytes_grow(
    model: TwoLayers, batch: tuple[torch.Tensor, torch.Tensor], mode: str
) -> None:
    points = points_of(model, batch, mode)
    assert list(points) == ["fc1", "fc2"]
    for layer in points.values():
        assert [p.epsilon for p in layer] == list(EPSILONS)
        assert [p.saved_bytes for p in layer] == sorted(p.saved_bytes for p in layer)
        assert layer[0].gradient_error > layer[2].gradient_error > layer[3].gradient_error
        assert (
            layer[3].gradient_error < 1e-4 * layer[0].gradient_error
        )  # all energy: rounding of fp32 is left


@pytest.mark.parametrize("mode", ["feature", "feature+token", "feature+token+batch"])
def test_a_mode_that_needs_all_its_axes_is_whole_and_costs_no_basis(
    model: TwoLayers, batch: tuple[torch.Tensor, torch.Tensor], mode: str
) -> None:
    for name, layer in points_of(model, batch, mode).items():
        assert layer[-1].ranks == ActivationRanks()
        assert layer[-1].saved_bytes == 4 * 8 * 6 * {"fc1": 12, "fc2": 20}[name]
        assert layer[-1].gradient_error == 0


def test_the_error_is_that_of_the_weights_gradient(
    model: TwoLayers, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Against autograd: the gradient of fc1's weight when its input is projected by hand."""
    x, labels = batch
    rank = points_of(model, batch)["fc1"][1].ranks.feature
    flat = x.reshape(-1, 12)
    basis = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :rank]
    hidden = model.fc1(x).detach().requires_grad_()
    F.cross_entropy(model.fc2(F.gelu(hidden)).mean(1), labels).backward()
    assert hidden.grad is not None
    dY = hidden.grad.reshape(-1, 20)
    expected = torch.linalg.norm(dY.T @ flat - dY.T @ flat @ basis @ basis.T)
    assert points_of(model, batch)["fc1"][1].gradient_error == pytest.approx(expected.item(), rel=1e-4)


def test_the_model_keeps_its_mode_its_gradients_and_its_hooks(
    model: TwoLayers, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    points_of(model, batch)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.fc1._forward_hooks


def test_the_choice_has_the_smallest_total_error_of_all_that_fit(
    model: TwoLayers, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    points = points_of(model, batch)
    for budget in range(
        sum(layer[0].saved_bytes for layer in points.values()),
        sum(layer[-1].saved_bytes for layer in points.values()),
        1000,
    ):
        chosen = choose_activations(points, budget)
        assert sum(point.saved_bytes for point in chosen.values()) <= budget
        fitting = [
            a.gradient_error + b.gradient_error
            for a in points["fc1"]
            for b in points["fc2"]
            if a.saved_bytes + b.saved_bytes <= budget
        ]
        total = sum(point.gradient_error for point in chosen.values())
        assert total <= min(fitting) * 1.001


def test_a_budget_below_the_smallest_is_refused_and_not_met_in_silence(
    model: TwoLayers, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    points = points_of(model, batch)
    smallest = sum(layer[0].saved_bytes for layer in points.values())
    message = f"at least {smallest:,} bytes of saved inputs are needed, got {smallest - 1:,}"
    with pytest.raises(RankError, match=message):
        choose_activations(points, smallest - 1)
