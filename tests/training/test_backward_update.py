import pytest
import torch

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.training.backward_update import OPTIMIZERS, parameter_blocks, updates_in_backward
from wasi_export.training.models import create_model
from wasi_export.training.optim import create_optimizer


def train(model, config, *, in_backward, steps=3):
    """Takes steps on fixed images; returns the weights."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 1, 16, 16), torch.randint(10, (4,))
    optimizer = create_optimizer(model, config)

    def take_steps():
        for _ in range(steps):
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    if in_backward:
        with updates_in_backward(model, model.blocks, optimizer, config):
            take_steps()
    else:
        take_steps()
    return model.state_dict()


@pytest.fixture
def pair(tiny):
    """Two models with the same weights."""
    first, second = create_model(tiny().model, 10), create_model(tiny().model, 10)
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_without_clipping_the_weights_are_bit_for_bit_those_of_the_ordinary_step(pair, opt):
    config = TrainConfig(opt=opt, lr=1e-3, clip_grad=None)
    expected = train(pair[0], config, in_backward=False)
    found = train(pair[1], config, in_backward=True)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("update", ["factors", "right"])
def test_factored_layers_are_updated_by_their_rule(pair, update):
    for model in pair:
        torch.manual_seed(1)
        model.blocks[1].mlp.fc1 = SubspaceLinear(64, 256, 16)
    config = TrainConfig(update=update, lr=1e-3, clip_grad=None)
    # Nine steps, as `left` is made orthonormal in the eighth.
    expected = train(pair[0], config, in_backward=False, steps=9)
    found = train(pair[1], config, in_backward=True, steps=9)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("opt", ["adan", "lamb", "muon"])
def test_an_optimizer_that_needs_all_gradients_at_once_is_refused(pair, opt):
    config = TrainConfig(opt=opt)
    optimizer = create_optimizer(pair[0], TrainConfig())
    with (
        pytest.raises(ConfigError, match=rf"one by one, got opt = '{opt}': choose one of adafactor"),
        updates_in_backward(pair[0], pair[0].blocks, optimizer, config),
    ):
        pass


@pytest.mark.parametrize("opt", ["adan", "lamb"])
def test_an_optimizer_that_is_refused_would_come_to_other_weights(pair, opt, monkeypatch):
    monkeypatch.setattr("wasi_export.training.backward_update.OPTIMIZERS", (opt,))
    config = TrainConfig(opt=opt, lr=1e-3, clip_grad=None)
    expected = train(pair[0], config, in_backward=False)
    found = train(pair[1], config, in_backward=True)
    assert not all(torch.equal(expected[name], found[name]) for name in expected)


def test_each_block_is_clipped_by_its_own_norm(pair):
    model = pair[0]
    config = TrainConfig(opt="sgd", lr=1.0, weight_decay=0.0, clip_grad=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = train(model, config, in_backward=True, steps=1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_blocks(model, model.blocks)
    assert len(groups) > len(model.blocks)
    for group in groups:
        moved = [after[names[id(p)]] - before[names[id(p)]] for p in group]
        norm = torch.cat([m.flatten() for m in moved]).norm().item()
        # The first step of timm's sgd (Nesterov, momentum 0.9) is 1.9 gradients; torch adds 1e-6 to norms.
        assert norm == pytest.approx(1.9e-3, rel=1e-3)


def test_every_parameter_is_in_one_group_and_a_block_in_one(model):
    groups = parameter_blocks(model, model.blocks)
    counted = [id(parameter) for group in groups for parameter in group]
    assert sorted(counted) == sorted(id(parameter) for parameter in model.parameters())
    for block, group in zip(model.blocks, groups, strict=False):
        assert list(map(id, group)) == list(map(id, block.parameters()))


def test_gradients_of_one_block_exist_at_a_time(model):
    config = TrainConfig(opt="sgd")
    held = []

    def note(_):
        held.append(
            {int(n.split(".")[1]) for n, p in model.blocks.named_parameters(prefix="b") if p.grad is not None}
        )

    optimizer = create_optimizer(model, config)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    with updates_in_backward(model, model.blocks, optimizer, config):
        model(torch.randn(2, 1, 16, 16)).sum().backward()
    assert {len(blocks) for blocks in held} == {0, 1}
    assert all(parameter.grad is None for parameter in model.parameters())
    held.clear()
    model(torch.randn(2, 1, 16, 16)).sum().backward()  # the hooks are gone
    assert max(len(blocks) for blocks in held) == 2


def test_a_block_with_an_unused_parameter_waits_for_the_ordinary_step(model):
    config = TrainConfig(opt="sgd", lr=1.0)
    model.blocks[0].unused = torch.nn.Parameter(torch.zeros(3))
    optimizer = create_optimizer(model, config)
    before = model.blocks[0].norm1.bias.detach().clone()
    with updates_in_backward(model, model.blocks, optimizer, config):
        model(torch.randn(2, 1, 16, 16)).sum().backward()
        gradient = model.blocks[0].norm1.bias.grad.clone()
        assert torch.equal(model.blocks[0].norm1.bias, before)
        optimizer.step()
    moved = model.blocks[0].norm1.bias - before
    torch.testing.assert_close(moved, -1.9 * gradient)  # once, by Nesterov's first step of 1.9 gradients
