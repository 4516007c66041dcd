"""Operators one by one, with their gradients, on odd sizes, against torch."""

from collections.abc import Callable

import onnx
import pytest
import torch
from torch import Tensor, nn
from training_steps import Scalars, labelled, make_random, run_both, spec_for

from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.training_step import export_training_step

Body = Callable[[], nn.Module]


class Small(nn.Module):
    """A body between a 1×1 convolution, so that its gradient is needed, and a classifier."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), body, nn.Linear(channels, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).flatten(2).mean(2))


class Does(nn.Module):
    """A function of [B, C, H, W] with a parameter [8, 8]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(8, 8)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def write_into(x: Tensor, weight: Tensor) -> Tensor:
    y = x * 2
    y += weight.mean()
    return y.mul_(3).relu_()


def lookup(x: Tensor, weight: Tensor) -> Tensor:
    places = torch.tensor([[0, 1, 1], [7, 0, 3]])
    return x * (weight[:, places].sum((1, 2)) + weight[places].mean((0, 1)))[:, None, None]


BODIES: dict[str, tuple[Body, int]] = {
    "strides that leave a rest": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), 6),
    "strides past the filter": (lambda: nn.Conv2d(8, 6, 2, stride=3), 6),
    "uneven padding": (lambda: nn.Conv2d(8, 6, (3, 1), stride=(1, 2), padding=(2, 0), bias=False), 6),
    "dilation": (lambda: nn.Conv2d(8, 6, 3, dilation=2, padding=1), 6),
    "groups": (lambda: nn.Conv2d(8, 6, 3, groups=2, stride=2), 6),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8, padding=1), 16),
    "one filter for all": (lambda: nn.Conv2d(8, 1, 3), 1),
    "batch norm": (lambda: nn.BatchNorm2d(8), 8),
    "batch norm without weights": (lambda: nn.BatchNorm2d(8, affine=False), 8),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), 8),
    "group norm": (lambda: nn.GroupNorm(2, 8), 8),
    "largest of windows": (lambda: nn.MaxPool2d(3, 2, 1), 8),
    "largest, up to the edge": (lambda: nn.MaxPool2d(2, 2, ceil_mode=True), 8),
    "mean of windows": (lambda: nn.AvgPool2d(2, 2), 8),
    "mean, padding counts": (lambda: nn.AvgPool2d(3, 2, 1), 8),
    "mean, padding does not count": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), 8),
    "mean to one pixel": (lambda: nn.AdaptiveAvgPool2d(1), 8),
    "tanh gelu": (lambda: nn.GELU("tanh"), 8),
    "silu in place": (lambda: nn.SiLU(inplace=True), 8),
    "hard swish in place": (lambda: nn.Hardswish(inplace=True), 8),
    "relu6 in place": (lambda: nn.ReLU6(inplace=True), 8),
    "leaky relu": (lambda: nn.LeakyReLU(0.1), 8),
    "elu": (lambda: nn.ELU(), 8),
    "mish": (lambda: nn.Mish(), 8),
    "softplus": (lambda: nn.Softplus(), 8),
    "sigmoid": (lambda: nn.Sigmoid(), 8),
    "prelu": (lambda: nn.PReLU(8), 8),
    "writes in place": (lambda: Does(write_into), 8),
    "places of a table": (lambda: Does(lookup), 8),
    "steps": (lambda: Does(lambda x, w: x[:, :, 1::2, -7:-1:3] * w.mean()), 8),
    "padding on some sides": (
        lambda: Does(lambda x, w: nn.functional.pad(x * w.sum(), (1, 0, -2, 3), value=2.0)),
        8,
    ),
    "rolled": (lambda: Does(lambda x, w: x.roll((3, -2), (2, 3)) * w[:, :1, None].roll(1, 0)), 8),
    "flipped and repeated": (lambda: Does(lambda x, w: x.flip(2) * w[:, 0].repeat(2)[4:12, None, None]), 8),
    "sums so far": (lambda: Does(lambda x, w: x.cumsum(2) * w.mean()), 8),
    "variance": (lambda: Does(lambda x, w: x * w.var(1, keepdim=True)[:, None]), 8),
    "largest and smallest": (lambda: Does(lambda x, w: x.amax(3) - torch.minimum(x, w.mean()).sum(3)), 8),
    "masked": (lambda: Does(lambda x, w: x.masked_fill((x > 0.1) & ~(x > 0.5) | (x == 9), 0.3) * w.sum()), 8),
    "powers": (lambda: Does(lambda x, w: (x.abs() + 1) ** 1.5 / (w * w + 1).sqrt().sum() + 2 ** x.tanh()), 8),
}


@pytest.mark.parametrize("name", BODIES)
def test_an_operator_has_the_output_and_the_gradient_of_torch(name: str) -> None:
    """In two steps: an error of the gradient shows in the parameters, of the output in the loss.

    Losses are up to ten, so 1e-5 is about ten roundings of them.
    """
    make, channels = BODIES[name]
    torch.manual_seed(0)
    model = make_random(Small(make(), channels))
    settings = StepSettings(opt="sgd", recompute="none")
    names = [parameter for parameter, _ in model.named_parameters()]
    exported = export_training_step(model, spec_for(11), names, settings)
    onnx.checker.check_model(exported.step, full_check=True)
    apart = run_both(model, exported, settings, labelled((3, 1), (3, 11, 11), 4), Scalars(0.3))
    assert apart.loss < 1e-5
    assert apart.update < 1e-5
    assert apart.moved > 1e-4
