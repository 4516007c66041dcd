"""Recomputed modules against the same modules run plainly."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from wasi_export.errors import UnsupportedModelError
from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.linear import BASIS_PERIOD, SubspaceLinear
from wasi_export.training.recompute import recomputed


class Mixer(nn.Module):
    """Mixes tokens and features of each sample, at random where asked."""

    def __init__(self, *, dropout=0.0, drop_path=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(5, 5))
        self.drop, self.path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x, scale=None, mask=None):
        y = self.drop(torch.tanh(self.fc(self.norm(x))))
        y = self.mix @ y
        y = y if scale is None else y * scale
        y = y if mask is None else y * mask
        return x + self.path(y)


def run(module, x, *args, seed=1, **kwargs):
    """Returns the output and the gradients of x and the parameters."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    y = module(x, *args, **kwargs)
    following = torch.rand(3)
    (y * torch.arange(y.numel()).reshape(y.shape) / y.numel()).sum().backward()
    found = [y.detach(), following, x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return found


def assert_same(found, expected, *, exactly=False):
    for ours, theirs in zip(found, expected, strict=True):
        # fp32 sums over the samples in another order: some roundings of 6e-8.
        tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 2e-5, "atol": 2e-6}
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(7, 5, 8)


@pytest.mark.parametrize("random", [{}, {"dropout": 0.5}, {"drop_path": 0.5}], ids=str)
def test_the_whole_batch_again_gives_the_same_bits(x, random):
    module = Mixer(**random)
    expected = run(module, x)
    with recomputed(module, name="mixer"):
        assert_same(run(module, x), expected, exactly=True)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_give_the_same_gradients_the_last_odd_or_not(x, chunk):
    module = Mixer()
    expected = run(module, x)
    with recomputed(module, name="mixer", chunk=chunk):
        assert_same(run(module, x), expected)


def test_random_numbers_of_a_chunk_are_drawn_again_in_backward(x):
    # y = D·1 and dy/dx = D: output and gradient show which numbers were drawn.
    module = nn.Dropout(0.5)
    x = torch.ones_like(x).requires_grad_()
    with recomputed(module, name="dropout", chunk=2):
        y = module(x)
        y.sum().backward()
    assert 0 < (y == 0).sum() < y.numel()
    torch.testing.assert_close(x.grad, y.detach(), rtol=0, atol=0)
    assert not torch.equal(y[0], y[2])  # a chunk's numbers are its own


def test_the_generator_goes_on_after_a_backward_pass_as_without(x):
    module = Mixer(dropout=0.5)

    def next_number():
        run(module, x)
        return torch.rand(1)

    expected = next_number()
    with recomputed(module, name="mixer"):
        assert next_number() == expected


def test_a_differentiated_argument_gets_its_gradient_over_all_chunks(x):
    module = Mixer()
    scale = torch.full((8,), 0.7, requires_grad=True)
    expected = run(module, x, scale=scale), scale.grad
    scale.grad = None
    with recomputed(module, name="mixer", chunk=3):
        assert_same(run(module, x, scale=scale), expected[0])
    torch.testing.assert_close(scale.grad, expected[1], rtol=2e-5, atol=2e-6)


def test_an_argument_with_a_sample_axis_is_not_cut_apart_from_its_samples(x):
    module = Mixer()
    mask = torch.rand(7, 5, 8)
    expected = run(module, x, None, mask)
    with recomputed(module, name="mixer", chunk=3):
        assert_same(run(module, x, None, mask), expected)


def test_an_input_without_gradient_still_trains_the_parameters(x):
    module = Mixer()
    with recomputed(module, name="mixer", chunk=3):
        module(x).sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).sum().backward()
    assert_same(found, [p.grad for p in module.parameters()])


def test_a_frozen_parameter_gets_no_gradient(x):
    module = Mixer()
    module.fc.weight.requires_grad_(False)
    with recomputed(module, name="mixer"):
        module(x).sum().backward()
    assert module.fc.weight.grad is None
    assert module.fc.bias.grad is not None


def test_a_bf16_boundary_errs_by_its_rounding_alone(x):
    module = Mixer()
    expected = run(module, x)
    with recomputed(module, name="mixer", boundary="bf16"):
        found = run(module, x)
    assert_same(found[:1], expected[:1], exactly=True)  # the output
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 0.02  # inputs are off by 2⁻⁹ and less
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(found[2:], expected[2:], strict=True))


def test_autocast_is_the_same_again(x):
    module = Mixer()

    def in_bf16():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        y.float().sum().backward()
        found = [p.grad for p in module.parameters()]
        module.zero_grad()
        return found

    expected = in_bf16()
    with recomputed(module, name="mixer"):
        assert_same(in_bf16(), expected, exactly=True)


@pytest.mark.parametrize(("chunk", "passes"), [(None, 1), (3, 3)])
def test_a_basis_moves_in_the_second_pass_and_not_in_the_first(x, chunk, passes):
    layer, steps, moved = SubspaceLinear(8, 8, 4, activation=ActivationRanks(feature=3)), 17, []
    with recomputed(layer, name="layer", chunk=chunk):
        for step in range(steps):
            before = layer.feature_basis
            y = layer(x)
            assert layer.feature_basis is before
            y.sum().backward()
            if layer.feature_basis is not before:
                moved.append(step)
    assert layer.passes == steps * passes
    assert moved == sorted({turn // passes for turn in range(0, steps * passes, BASIS_PERIOD)})


def test_a_recomputed_layer_has_the_bases_of_a_plain_one(x):
    layers = [SubspaceLinear(8, 8, 4, activation=ActivationRanks(feature=3)) for _ in range(2)]
    for step in range(BASIS_PERIOD + 1):
        layers[0](x + step).sum().backward()
        with recomputed(layers[1], name="layer"):
            layers[1](x + step).sum().backward()
        assert torch.equal(layers[0].feature_basis, layers[1].feature_basis)


def test_between_forward_and_backward_only_the_input_is_kept(x):
    module = Mixer()
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    def kept_samples():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            module(x.requires_grad_())
        return [tensor for tensor in kept if tensor.shape[:1] == x.shape[:1]]

    assert len(kept_samples()) > 2
    with recomputed(module, name="mixer"):
        assert [tensor.data_ptr() for tensor in kept_samples()] == [x.data_ptr()]
    with recomputed(module, name="mixer", boundary="bf16"):
        assert [tensor.dtype for tensor in kept_samples()] == [torch.bfloat16]


def test_nothing_changes_without_a_gradient_or_afterwards(x):
    module = Mixer()
    names, plain = list(module.state_dict()), module(x)
    with recomputed(module, name="mixer", chunk=2):
        assert list(module.state_dict()) == names
        assert module(x).grad_fn.name() == "_RecomputeBackward"
        with torch.no_grad():
            assert torch.equal(module(x), plain)
    assert "forward" not in vars(module)
    assert module(x).grad_fn.name() == plain.grad_fn.name()


def test_a_module_that_returns_several_tensors_is_refused_by_name(x):
    class Pair(nn.Linear):
        def forward(self, x):
            return x, super().forward(x)

    module = Pair(8, 8)
    with (
        recomputed(module, name="blocks.0"),
        pytest.raises(UnsupportedModelError, match=r"blocks\.0 does not return one tensor .*block_recompute"),
    ):
        module(x)
