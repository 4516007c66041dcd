"""A factored 1×1 convolution is two convolutions, and a factored Linear layer over pixels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.conv import SubspaceConv1x1

STRIDES = [(1, 1), (2, 2), (1, 3)]


def make_layer(stride: tuple[int, int] = (1, 1), **options: object) -> SubspaceConv1x1:
    torch.manual_seed(0)
    layer = SubspaceConv1x1(12, 7, 3, stride=stride, **options).double()  # type: ignore[arg-type]
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


def images(*, height: int = 5, width: int = 7, channels: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)


def two_convolutions(layer: SubspaceConv1x1, x: Tensor) -> Tensor:
    code = F.conv2d(x, layer.right[:, :, None, None], stride=layer.stride)
    return F.conv2d(code, layer.left[:, :, None, None], layer.bias)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_two_convolutions_in_training_and_in_evaluation(stride: tuple[int, int], bias: bool) -> None:
    layer, x = make_layer(stride, bias=bias), images()
    expected = two_convolutions(layer, x)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), expected)


@pytest.mark.parametrize("stride", STRIDES)
def test_gradients_are_those_of_two_convolutions(stride: tuple[int, int]) -> None:
    layer, x = make_layer(stride), images().requires_grad_()
    inputs = [x, *layer.parameters()]
    weights = torch.randn_like(layer(x))
    ours = torch.autograd.grad((layer(x) * weights).sum(), inputs)
    theirs = torch.autograd.grad((two_convolutions(layer, x) * weights).sum(), inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, rtol=0, atol=1e-11)


def test_a_full_feature_basis_changes_no_gradient() -> None:
    whole, kept = make_layer(), make_layer(activation=ActivationRanks(feature=12))
    for layer in (whole, kept):
        layer(images()).square().sum().backward()
    for ours, reference in zip(kept.parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None
        assert reference.grad is not None
        assert torch.allclose(ours.grad, reference.grad, rtol=0, atol=1e-10)


def test_a_small_feature_basis_keeps_fewer_numbers_and_changes_the_gradient() -> None:
    saved: list[int] = []

    def gradient(layer: SubspaceConv1x1) -> Tensor:
        def pack(tensor: Tensor) -> Tensor:
            saved[-1] += tensor.numel() if tensor.ndim == 4 else 0
            return tensor

        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(images())
        y.square().sum().backward()
        assert layer.right.grad is not None
        return layer.right.grad

    exact = gradient(make_layer())
    compressed = gradient(make_layer(activation=ActivationRanks(feature=4)))
    assert saved == [2 * 5 * 7 * 12, 2 * 5 * 7 * 4]
    assert not torch.allclose(exact, compressed, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 8), (8, 3)])
def test_any_image_size_and_memory_format_will_do(height: int, width: int) -> None:
    layer, x = make_layer((2, 2)), images(height=height, width=width)
    expected = two_convolutions(layer, x)
    for memory in (torch.contiguous_format, torch.channels_last):
        y = layer(x.contiguous(memory_format=memory))
        assert y.shape == expected.shape
        assert torch.allclose(y, expected, rtol=0, atol=1e-13)


def test_its_state_is_that_of_a_factored_linear_layer() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in make_layer().named_parameters()}
    assert shapes == {"left": (7, 3), "right": (3, 12), "bias": (7,)}
