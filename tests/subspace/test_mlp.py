import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.mlp import ROWS, factored_mlp

INPUTS = ("x", "left1", "right1", "bias1", "left2", "right2", "bias2")


def layers(*, bias=True, activation=None, dtype=torch.float64):
    torch.manual_seed(0)
    fc1 = SubspaceLinear(6, 10, 4, bias=bias, activation=activation)
    fc2 = SubspaceLinear(10, 5, 3, bias=bias)
    for layer in (fc1, fc2):
        if bias:
            nn.init.normal_(layer.bias)
    return fc1.to(dtype), fc2.to(dtype)


def gradients(y, fc1, fc2, x):
    wanted = {"x": x, "left1": fc1.left, "right1": fc1.right, "bias1": fc1.bias}
    wanted |= {"left2": fc2.left, "right2": fc2.right, "bias2": fc2.bias}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor is not None and tensor.requires_grad}
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return dict(zip(wanted, torch.autograd.grad((y * weight).sum(), wanted.values()), strict=True))


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.ReLU()], ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (2, 3, 2, 6), (2 * ROWS + 1, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_layers(act, shape, bias):
    fc1, fc2 = layers(bias=bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, found = fc2(act(fc1(x))), factored_mlp(x, fc1, act, fc2)
    # fp64; the sums over rows are taken in another order.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(expected, fc1, fc2, x).items():
        torch.testing.assert_close(
            gradients(factored_mlp(x, fc1, act, fc2), fc1, fc2, x)[name], gradient, rtol=1e-10, atol=1e-10
        )


def test_gradients_are_those_of_finite_differences():
    fc1, fc2 = layers()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    parameters = (fc1.left, fc1.right, fc1.bias, fc2.left, fc2.right, fc2.bias)

    def value():
        return factored_mlp(x, fc1, nn.GELU(), fc2).sum()

    found = torch.autograd.grad(value(), (x, *parameters))
    for tensor, gradient in zip((x, *parameters), found, strict=True):
        for index in ((0,) * tensor.ndim, (-1,) * tensor.ndim):
            step, values = 1e-6, []
            for sign in (1, -1):
                with torch.no_grad():
                    tensor[index] += sign * step
                    values.append(value())
                    tensor[index] -= sign * step
            # Central differences in fp64: an error of step² and of rounding over step.
            torch.testing.assert_close(
                (values[0] - values[1]) / (2 * step), gradient[index], rtol=1e-6, atol=1e-7
            )


def test_frozen_factors_get_no_gradient():
    fc1, fc2 = layers()
    fc1.left.requires_grad_(False)
    fc2.left.requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = gradients(fc2(nn.GELU()(fc1(x))), fc1, fc2, x)
    found = gradients(factored_mlp(x, fc1, nn.GELU(), fc2), fc1, fc2, x)
    assert found.keys() == expected.keys() == {"right1", "bias1", "right2", "bias2"}
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    "activation",
    [
        ActivationRanks(feature=3),
        ActivationRanks(batch=1, batch_count=2),
        ActivationRanks(feature=3, token=2, token_count=4, batch=1, batch_count=2),
    ],
    ids=str,
)
def test_a_compressed_input_gives_the_gradients_of_the_layer_that_compresses(activation):
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    found, expected = [], []
    for results, mlp in ((expected, lambda x, a, act, b: b(act(a(x)))), (found, factored_mlp)):
        fc1, fc2 = layers(activation=activation)
        results.append(gradients(mlp(x, fc1, nn.GELU(), fc2), fc1, fc2, x)["right1"])
        results.append(fc1.feature_basis)
        assert fc1.passes == 1
    whole = gradients(fc2(nn.GELU()(F.linear(F.linear(x, fc1.right), fc1.left, fc1.bias))), fc1, fc2, x)
    assert not torch.allclose(found[0], whole["right1"])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_kept_has_the_size_of_the_codes():
    fc1, fc2 = layers(dtype=torch.float32)
    x = torch.randn(100, 6, requires_grad=True)
    kept = []

    def note(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        factored_mlp(x, fc1, nn.GELU(), fc2)
    rows = sorted(shape[1] for shape in kept if shape[0] == 100)
    assert rows == [3, 4, 6]  # z2, z1 and x; the hidden layer has 10


def test_autocast_gives_the_gradients_of_the_layers_in_bf16():
    fc1, fc2 = layers(dtype=torch.float32)
    x = torch.randn(50, 6, requires_grad=True)
    exact = gradients(fc2(nn.GELU()(fc1(x))), fc1, fc2, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = factored_mlp(x, fc1, nn.GELU(), fc2)
    assert y.dtype is torch.bfloat16
    for name, gradient in gradients(y, fc1, fc2, x).items():
        assert gradient.dtype is torch.float32
        error = (gradient - exact[name]).norm() / exact[name].norm()
        assert error < 8 * 2**-8, name  # bf16 keeps 8 bits; up to eight roundings, of 2⁻⁹ to 2⁻⁸ each
