"""The losses of a step against those of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_steps import Scalars, make_random, run_both, spec_for

from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.losses import example_targets, loss_and_correct
from wasi_export.converters.training_step import export_training_step

CLASSES = 7
CASES = [("cross_entropy", 0.0), ("cross_entropy", 0.1), ("soft_targets", 0.0), ("mse", 0.0)]


def make_targets(loss: str, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Returns labels, probabilities or numbers, as the loss takes them."""
    if loss == "cross_entropy":
        return torch.randint(CLASSES, (len(outputs),), generator=generator)
    numbers = torch.randn(outputs.shape, generator=generator)
    return numbers.softmax(1) if loss == "soft_targets" else numbers


def torch_loss(loss: str, outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    if loss == "mse":
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs, targets, label_smoothing=smoothing)


@pytest.mark.parametrize("count", [1, 5, 32])
@pytest.mark.parametrize(("loss", "smoothing"), CASES)
def test_a_loss_and_its_gradient_are_those_of_torch(loss: str, smoothing: float, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    outputs = (3 * torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = make_targets(loss, outputs, generator)
    found, correct = loss_and_correct(loss, outputs, targets, smoothing=smoothing)
    expected = torch_loss(
        loss, outputs, targets.to(outputs.dtype) if targets.ndim > 1 else targets, smoothing
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, outputs)[0] for value in (found, expected)))
    best = targets if targets.ndim == 1 else targets.argmax(1)
    assert correct == (outputs.argmax(1) == best).sum()


@pytest.mark.parametrize("outputs", [torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[80.0, 0.0, -200.0]])])
def test_outputs_of_any_size_have_a_finite_loss_and_gradient(outputs: Tensor) -> None:
    outputs = outputs.requires_grad_()
    loss, _ = loss_and_correct("cross_entropy", outputs, torch.tensor([1]), smoothing=0.0)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("loss", "smoothing"), CASES)
def test_a_graph_takes_the_targets_of_its_loss_and_learns_as_torch(loss: str, smoothing: float) -> None:
    """A linear model: sums of 48 products, so 1e-6 is ten roundings."""
    torch.manual_seed(0)
    model = make_random(nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)))
    settings = StepSettings(opt="sgd", loss=loss, smoothing=smoothing, recompute="none")
    names = [name for name, _ in model.named_parameters()]
    exported = export_training_step(model, spec_for(4), names, settings)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count in (4, 1, 9):
        images = torch.randn(count, 3, 4, 4, generator=generator)
        batches.append((images, make_targets(loss, torch.zeros(count, CLASSES), generator)))
    apart = run_both(model, exported, settings, batches, Scalars(0.1))
    assert apart.loss < 1e-6
    assert apart.parameter < 1e-6
    assert apart.moved > 1e-3


@pytest.mark.parametrize(
    ("loss", "shape"), [("cross_entropy", (4,)), ("soft_targets", (4, 3)), ("mse", (4, 3))]
)
def test_examples_of_targets_have_the_shape_of_the_loss(loss: str, shape: tuple[int, ...]) -> None:
    targets = example_targets(loss, 4, 3)
    assert targets.shape == shape
    assert (targets.dtype == torch.int64) == (loss == "cross_entropy")
