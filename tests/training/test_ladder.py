"""The memory switches on whole models: the gradients they give, what they refuse, training with them."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from timm.layers import Mlp
from torch import nn

from wasi_export.config import MemoryConfig, ModelConfig, TrainConfig
from wasi_export.errors import ConfigError
from wasi_export.interrupt import TrainingInterrupted
from wasi_export.ranks import LayerPlan, Plan
from wasi_export.subspace.conv import SubspaceConv1x1
from wasi_export.subspace.inject import install_layers, subspace_layers
from wasi_export.training.data import make_loader, random_numbers
from wasi_export.training.ladder import recomputable_blocks, recomputable_mlps, saving_memory
from wasi_export.training.loop import fit
from wasi_export.training.models import create_model, input_spec
from wasi_export.training.optim import create_optimizer
from wasi_export.training.step import TrainingStep

EXACT = {
    "mlp": MemoryConfig(mlp_recompute=True),
    "blocks": MemoryConfig(block_recompute=True),
    "blocks of mlps": MemoryConfig(block_recompute=True, mlp_recompute=True),
    "chunks": MemoryConfig(block_recompute=True, block_chunk=3),
    "micro-batches": MemoryConfig(micro_batch=3),
    "fast": MemoryConfig(level="fast"),
    "small": MemoryConfig(level="small"),
}


def make(name="vit_tiny_patch16_224", *, factor=False, **kwargs):
    """Returns a small model with fixed random weights."""
    size = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8} if name.startswith("vit") else {}
    with random_numbers(0):
        model = create_model(ModelConfig(name=name, img_size=32, kwargs=size | kwargs), 10)
        if factor:
            install_drawn(model)
    return model


def convolutional():
    return create_model(ModelConfig(name="test_resnet"), 10)


def install_drawn(model):
    """Replaces every Linear layer in the blocks by random factors, in place."""
    install_layers(model, plan_of(model))
    for _, layer in subspace_layers(model):
        layer.reset_parameters()


def plan_of(model, rank=16):
    """Returns a plan that factors every Linear layer in the blocks."""
    names = [n for n, module in model.named_modules() if type(module) is nn.Linear and "blocks." in n]
    layers = []
    for name in names:
        out_features, in_features = model.get_submodule(name).weight.shape
        layers.append(
            LayerPlan(
                name=name,
                in_features=in_features,
                out_features=out_features,
                rank=rank,
                method="plain",
                energy=1.0,
                reason="",
            )
        )
    return Plan(activation_mode="none", layers=tuple(layers))


def step_of(model, memory, *, batch=8, **options):
    """Takes one training step; returns its loss and the gradients that it ended with."""
    train = TrainConfig(memory=memory, clip_grad=None, **options)
    optimizer = create_optimizer(model, train)
    found = {}

    def note(*_):
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(note)
    step = TrainingStep(Accelerator(cpu=True), model.train(), optimizer, train, seed=0)
    torch.manual_seed(3)
    with saving_memory(model, optimizer, train):
        loss = step(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)), 0)
    return loss, found


def assert_same(found, expected):
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        # fp32, two blocks deep; the sums over 8 images are taken in another order.
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-7)
        assert error < 2e-5, name


@pytest.mark.parametrize("memory", EXACT.values(), ids=EXACT)
def test_exact_switches_give_the_gradients_of_the_plain_step(memory):
    expected = step_of(make(factor=True), MemoryConfig())
    assert_same(step_of(make(factor=True), memory), expected)


def test_streaming_gives_the_gradients_of_the_plain_step_but_for_the_boundaries():
    expected = step_of(make(factor=True), MemoryConfig())
    exact = MemoryConfig(level="streamed", boundary="fp32")
    assert_same(step_of(make(factor=True), exact), expected)
    _, rounded = step_of(make(factor=True), MemoryConfig(level="streamed"))
    for name, gradient in expected[1].items():
        assert (rounded[name] - gradient).norm() < 0.02 * gradient.norm() + 1e-7, name
    assert any(not torch.equal(rounded[name], gradient) for name, gradient in expected[1].items())


@pytest.mark.parametrize("level", ["small", "streamed"])
def test_dense_models_use_the_same_switches(level):
    memory = MemoryConfig(
        level=level, mlp_recompute=False, **({"boundary": "fp32"} if level == "streamed" else {})
    )
    assert_same(step_of(make(), memory), step_of(make(), MemoryConfig()))


@pytest.mark.parametrize("batch", [1, 7])
def test_any_batch_size_can_be_split(batch):
    expected = step_of(make(), MemoryConfig(), batch=batch)
    assert_same(step_of(make(), MemoryConfig(micro_batch=4), batch=batch), expected)
    assert_same(step_of(make(), MemoryConfig(block_recompute=True, block_chunk=4), batch=batch), expected)


@pytest.mark.parametrize(
    ("memory", "passes"),
    [
        ({}, 1),
        ({"block_recompute": True}, 1),
        ({"block_recompute": True, "block_chunk": 3}, 3),
        ({"micro_batch": 3}, 3),
        ({"level": "small"}, 2),
    ],
    ids=str,
)
def test_a_step_is_a_pass_for_each_part_of_the_batch_however_often_it_is_computed(memory, passes):
    model = make(factor=True)
    step_of(model, MemoryConfig(**memory))
    assert model.get_submodule("blocks.0.attn.qkv").passes == passes


def test_mixup_is_drawn_for_the_whole_batch():
    expected = step_of(make(), MemoryConfig(), mixup=0.8, smoothing=0.1)
    assert_same(step_of(make(), MemoryConfig(micro_batch=3), mixup=0.8, smoothing=0.1), expected)


def test_stochastic_depth_and_dropout_are_those_of_the_forward_pass():
    kwargs = {"drop_path_rate": 0.5, "proj_drop_rate": 0.2}
    memory = MemoryConfig(block_recompute=True)
    expected = step_of(make(**kwargs), MemoryConfig())
    assert_same(step_of(make(**kwargs), memory), expected)
    without = step_of(make(), MemoryConfig())
    assert without[0] != expected[0]


MODELS = {
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
        2,
    ),
    "eva02_tiny_patch14_224": ({"embed_dim": 48, "depth": 2, "num_heads": 2, "patch_size": 8}, 2),
    "deit3_small_patch16_224": ({"embed_dim": 48, "depth": 2, "num_heads": 2, "patch_size": 8}, 2),
    "vit_small_patch14_reg4_dinov2": ({"embed_dim": 48, "depth": 2, "num_heads": 2, "patch_size": 8}, 2),
}


@pytest.mark.parametrize(("name", "kwargs", "blocks"), [(n, *v) for n, v in MODELS.items()], ids=MODELS)
def test_blocks_of_other_families_are_found_and_recomputed(name, kwargs, blocks):
    assert len(recomputable_blocks(make(name, **kwargs))) == blocks
    expected = step_of(make(name, **kwargs), MemoryConfig())
    assert_same(step_of(make(name, **kwargs), MemoryConfig(block_recompute=True, block_chunk=3)), expected)


def test_blocks_are_the_outermost_ones_without_batch_norm():
    class Block(nn.Module):
        def __init__(self, *inside):
            super().__init__()
            self.inside = nn.Sequential(*inside)

    model = nn.Sequential(Block(nn.BatchNorm2d(3), Block(nn.Linear(1, 1))), Block(Block(nn.Linear(1, 1))))
    assert list(recomputable_blocks(model)) == ["0.inside.1", "1"]


def test_only_factored_mlps_without_dropout_inside_are_recomputed():
    assert list(recomputable_mlps(make(factor=True))) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert recomputable_mlps(make()) == {}
    assert recomputable_mlps(make(factor=True, proj_drop_rate=0.1)) == {}


def test_mlps_of_convolutions_are_not_recomputed():
    mlp = Mlp(16, 32, use_conv=True)
    mlp.fc1, mlp.fc2 = SubspaceConv1x1(16, 32, 4), SubspaceConv1x1(32, 16, 4)
    assert recomputable_mlps(nn.Sequential(mlp)) == {}


@pytest.mark.parametrize(
    ("model", "memory", "message"),
    [
        (make, {"mlp_recompute": True}, r"mlp_recompute finds no MLP of two factored layers .*= false"),
        (convolutional, {"block_recompute": True}, r"block_recompute finds no block"),
        (convolutional, {"micro_batch": 2}, r"splits a batch that conv1.1 normalises as a whole"),
    ],
)
def test_a_switch_that_cannot_act_is_refused(model, memory, message):
    with pytest.raises(ConfigError, match=message):
        step_of(model(), MemoryConfig(**memory))


def test_scaled_gradients_are_not_used_in_the_backward_pass():
    config = TrainConfig(memory=MemoryConfig(update_in_backward=True))
    model = make()
    optimizer = create_optimizer(model, config)
    with saving_memory(model, optimizer, config, mixed_precision="bf16"):
        pass
    with (
        pytest.raises(ConfigError, match="scaled gradients of mixed precision fp16: use bf16"),
        saving_memory(model, optimizer, config, mixed_precision="fp16"),
    ):
        pass


def test_names_outputs_and_forwards_are_as_before():
    model, config = make(factor=True), TrainConfig(memory=MemoryConfig(level="small"))
    names, images = list(model.state_dict()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        with saving_memory(model, create_optimizer(model, config), config):
            assert list(model.state_dict()) == names
            assert torch.equal(model(images), plain)
    assert [n for n, module in model.named_modules() if "forward" in vars(module)] == []


class Training:
    """A training of the tiny factored model on digits, anew each time it is called."""

    def __init__(self, config, digits):
        self.config, self.digits = config, digits

    def __call__(self, run_dir=None, track=lambda items, label, total: items):
        with random_numbers(0):
            model = create_model(self.config.model, 10)
            install_drawn(model)
        spec = input_spec(model, self.config)
        train, val = self.digits
        loaders = (make_loader(train, spec, self.config.data, training=True),)
        loaders += (make_loader(val, spec, self.config.data, training=False),)
        history = fit(model, *loaders, self.config.train.subspace, run_dir, seed=0, key="k", track=track)
        return model, history


def interrupted(items, label, total):
    """Sends a signal in the middle of the second epoch."""
    for index, item in enumerate(items):
        if (label, index) == ("epoch 2/2", 2):
            os.kill(os.getpid(), signal.SIGINT)
        yield item


@pytest.mark.slow
@pytest.mark.parametrize("level", ["small", "streamed"])
def test_a_training_resumes_to_the_same_bits(tiny, digits, tmp_path, level):
    config = tiny(f"train.subspace.memory.level={level}", "model.kwargs.drop_path_rate=0.2")
    training = Training(config, digits)
    with pytest.raises(TrainingInterrupted):
        training(tmp_path, interrupted)
    resumed, whole = training(tmp_path)[0].state_dict(), training()[0].state_dict()
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("level", ["fast", "small", "streamed"])
def test_a_training_learns_what_the_plain_one_learns(tiny, digits, level):
    options = ["train.subspace.lr=3e-3", "train.subspace.clip_grad=1e9"]
    plain = Training(tiny(*options), digits)()[1][-1]
    saving = Training(tiny(*options, f"train.subspace.memory.level={level}"), digits)()[1][-1]
    # Ten steps of AdamW: roundings, in streamed of the boundaries to bf16, are carried on by its division.
    assert saving.train_loss == pytest.approx(plain.train_loss, rel=2e-2)
