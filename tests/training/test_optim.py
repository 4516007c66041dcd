"""Groups, schedules and the update rules as training takes them, on a factored model."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from wasi_export.config import SubspaceConfig, TrainConfig
from wasi_export.converters.step_graph.rates import parameter_rates
from wasi_export.errors import ConfigError
from wasi_export.runtimes.schedule import learning_rate
from wasi_export.subspace.gauge import GaugeFix
from wasi_export.subspace.inject import factorize_model, install_layers, subspace_layers
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.lora import add_lora
from wasi_export.training.models import create_model, head_modules
from wasi_export.training.optim import (
    SCHEDULES,
    common_rate,
    create_optimizer,
    create_scheduler,
    parameter_groups,
)
from wasi_export.training.profile_parts import part_times
from wasi_export.training.resume import CHECKPOINT, Position, position_to_resume, restore, save_position
from wasi_export.training.step import TrainingStep

RULES = {
    "factors": TrainConfig(lr=3e-3),
    "factors with momentum": TrainConfig(opt="sgd", lr=3e-2),
    "right": TrainConfig(update="right", lr=3e-3),
    "wsi": TrainConfig(update="wsi", lr=3e-3, factor_lr=0.03, refresh_every=4),
}
any_rule = pytest.mark.parametrize("config", RULES.values(), ids=RULES.keys())


def settings_of(model, config):
    """Returns (lr, weight decay) by parameter name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, config)
        for parameter in group["params"]
    }


def test_every_parameter_is_in_one_group_with_the_rate_of_its_part(model):
    groups = settings_of(model, TrainConfig(lr=1e-4, head_lr=2e-3))
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, (lr, _) in groups.items():
        assert lr == (2e-3 if name.startswith("head.") else 1e-4), name


def test_the_head_takes_the_common_rate_where_it_has_none(model):
    assert {lr for lr, _ in settings_of(model, TrainConfig(lr=1e-4)).values()} == {1e-4}


def test_matrices_and_factors_are_decayed_and_nothing_else(model):
    model.blocks[0].mlp.fc1 = SubspaceLinear(64, 256, 16)
    for name, (_, decay) in settings_of(model, TrainConfig(weight_decay=0.05)).items():
        vector = model.get_parameter(name).ndim == 1 or name in ("pos_embed", "cls_token")
        assert decay == (0.0 if vector else 0.05), name
    assert settings_of(model, TrainConfig(weight_decay=0.05))["blocks.0.mlp.fc1.left"][1] == 0.05


def test_an_unknown_optimizer_gets_the_nearest_ones(model):
    with pytest.raises(ConfigError, match="no optimizer 'adamww': did you mean adamw"):
        create_optimizer(model, TrainConfig(opt="adamww"))


def test_an_unknown_schedule_is_refused_with_the_known_ones(model):
    config = TrainConfig(sched="plateau")
    with pytest.raises(ConfigError, match=r"sched must be one of cosine, .*got 'plateau'"):
        create_scheduler(create_optimizer(model, config), config, 10)


def rates(config: TrainConfig, steps: int) -> list[float]:
    optimizer = create_optimizer(nn_with_head(), config)
    scheduler = create_scheduler(optimizer, config, steps)
    found = []
    for step in range(steps):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def nn_with_head() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.get_classifier = lambda: model[1]
    return model


def test_the_warm_up_is_linear_from_the_first_step():
    assert rates(TrainConfig(lr=1.0, warmup_steps=4, sched="constant"), 8) == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    )


def test_the_warm_up_takes_at_most_half_of_a_short_training():
    assert rates(TrainConfig(lr=1.0, warmup_steps=100, sched="constant"), 4)[2:] == [1, 1]


def test_a_cosine_falls_to_nearly_nothing():
    falling = rates(TrainConfig(lr=1.0, warmup_steps=0), 20)
    assert falling == sorted(falling, reverse=True)
    assert 0 < falling[-1] < 0.01


@pytest.mark.parametrize("sched", SCHEDULES)
def test_every_group_warms_up_to_its_own_rate(model, sched):
    config = TrainConfig(lr=9e-4, head_lr=3e-5, warmup_steps=10, sched=sched)
    optimizer = create_optimizer(model, config)
    highest = [group["lr"] for group in optimizer.param_groups]
    scheduler = create_scheduler(optimizer, config, 100)
    assert set(highest) == {9e-4, 3e-5}
    for step in range(10):
        scheduler.step_update(step)
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == pytest.approx([lr * (step + 1) / 11 for lr in highest])


@pytest.mark.parametrize("sched", ["cosine", "constant"])
@pytest.mark.parametrize("head_lr", [None, 3e-5, 2e-2])
@pytest.mark.parametrize("factor_lr", ["auto", 5e-4])
def test_training_and_the_board_have_one_rate_for_each_parameter(tiny, sched, head_lr, factor_lr):
    model = create_model(tiny().model, 64)
    subspace = SubspaceConfig(include=("head", "blocks.0.*"), rank=8, method="plain")
    factorize_model(model, [images(99, 20)], subspace, total=1)
    assert isinstance(model.head, SubspaceLinear)
    config = TrainConfig(lr=9e-4, head_lr=head_lr, factor_lr=factor_lr, warmup_steps=4, sched=sched)
    on_board = parameter_rates(
        model,
        [name for name, _ in model.named_parameters()],
        head=1.0 if head_lr is None else head_lr / config.lr,
        factors=None if factor_lr == "auto" else factor_lr / config.lr,
    )
    optimizer = create_optimizer(model, config)
    scheduler = create_scheduler(optimizer, config, 12)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for step in range(12):
        scheduler.step_update(step)
        rate = learning_rate(sched, step, lr=config.lr, steps=12, warmup=4)
        trained = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert trained == pytest.approx({name: rate * rates.lr for name, rates in on_board.items()})


@pytest.mark.parametrize("lora", [False, True], ids=["factored", "LoRA"])
def test_the_common_rate_is_not_that_of_the_head(model, lora):
    if lora:
        add_lora(model, ["blocks.0.mlp.fc1"], 4, trained=head_modules(model))
    else:
        factorize_model(
            model, [images(99, 20)], SubspaceConfig(rank=8, method="plain", activation="none"), total=1
        )
    optimizer = create_optimizer(model, TrainConfig(lr=2e-3, head_lr=1e-4))
    assert common_rate(model, optimizer) == 2e-3
    head = torch.optim.SGD(model.head.parameters(), lr=0.5)
    assert common_rate(model, head) == 0.5


@pytest.mark.parametrize("sched", SCHEDULES)
def test_a_schedule_is_a_function_of_the_step_alone(sched):
    config = TrainConfig(lr=1.0, warmup_steps=2, sched=sched)
    optimizer = create_optimizer(nn_with_head(), config)
    create_scheduler(optimizer, config, 10).step_update(7)
    assert optimizer.param_groups[0]["lr"] == rates(config, 10)[7]


def test_training_that_goes_on_warms_up_again_below_the_same_schedule():
    config = TrainConfig(lr=1.0, warmup_steps=3)
    optimizer = create_optimizer(nn_with_head(), config)
    whole, found = rates(config, 20), []
    scheduler = create_scheduler(optimizer, config, 20, start=10)
    for step in range(10, 20):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    shares = [rate / full for rate, full in zip(found, whole[10:], strict=True)]
    assert shares == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def images(step, count=6):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(step))


@pytest.fixture
def plan(model):
    """Factors the model, in place; returns how."""
    config = SubspaceConfig(rank=8, method="plain", activation_epsilon=0.9)
    return factorize_model(model, [images(99, 20)], config, total=1)


class Training:
    """Steps of a model on random images, by an optimiser with a rule attached."""

    def __init__(self, model, config):
        self.model, self.optimizer = model.train(), create_optimizer(model, config)
        self._step = TrainingStep(Accelerator(cpu=True), model, self.optimizer, config, seed=0)

    def __call__(self, steps, *, batches=100):
        """Returns the losses; batch b is that of every step b, b + batches, …"""
        return [self._step(images(step % batches), torch.arange(6), step) for step in steps]


@any_rule
def test_a_rule_lowers_the_loss_and_keeps_left_orthonormal(model, plan, config):
    losses = Training(model, config)(range(24), batches=1)
    assert losses[-1] < 0.5 * losses[0]
    for name, layer in subspace_layers(model):
        identity = layer.left.detach().T @ layer.left.detach()
        torch.testing.assert_close(identity, torch.eye(layer.rank), atol=1e-5, rtol=0, msg=name)


def test_the_rule_right_leaves_left_to_the_bit_and_moves_right(model, plan):
    before = {name: (layer.left.clone(), layer.right.clone()) for name, layer in subspace_layers(model)}
    Training(model, RULES["right"])(range(3))
    for name, layer in subspace_layers(model):
        assert torch.equal(layer.left, before[name][0]), name
        assert not torch.equal(layer.right, before[name][1]), name


@any_rule
def test_a_training_by_a_rule_resumes_to_the_same_bits(tiny, model, plan, tmp_path, config):
    whole = Training(model, config)
    whole(range(5))
    save_position(tmp_path / CHECKPOINT, Position(key="k"), whole.model, whole.optimizer)
    losses = whole(range(5, 18))  # over two moves of the gauge, three refreshes, two moves of the bases

    other = create_model(tiny().model, 10)
    install_layers(other, plan)
    resumed = Training(other, config)
    position = position_to_resume(tmp_path / CHECKPOINT, "k")
    restore(tmp_path / CHECKPOINT, position, resumed.model, resumed.optimizer)
    assert resumed(range(5, 18)) == losses
    state, other_state = model.state_dict(), other.state_dict()
    assert [name for name in state if not torch.equal(state[name], other_state[name])] == []


def test_wsi_sums_the_gradients_of_micro_batches(model, plan):
    config = RULES["wsi"].model_copy(update={"clip_grad": None})
    micro = config.model_copy(update={"memory": config.memory.model_copy(update={"micro_batch": 2})})
    for _, layer in subspace_layers(model):
        layer.passes += 1  # the bases stay where they are: in both they are those of the calibration
    other = copy.deepcopy(model)
    assert Training(other, micro)(range(2)) == pytest.approx(Training(model, config)(range(2)), rel=1e-5)
    for (name, layer), (_, twin) in zip(subspace_layers(model), subspace_layers(other), strict=True):
        torch.testing.assert_close(layer.left, twin.left, atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("update", ["right", "wsi"])
def test_a_rule_for_a_model_without_factored_layers_is_refused(model, update):
    config = TrainConfig(update=update, factor_lr=0.1)
    with pytest.raises(ConfigError, match=f'update = "{update}" is for factored layers, and the model has'):
        create_optimizer(model, config)


def test_wsi_with_inputs_kept_whole_is_refused(model):
    config = SubspaceConfig(rank=8, method="plain", activation="none")
    factorize_model(model, [images(99)], config, total=1)
    with pytest.raises(ConfigError, match=r"qkv keeps its input whole .*: set subspace.activation"):
        create_optimizer(model, TrainConfig(update="wsi", factor_lr=0.1))


def test_factors_with_an_optimizer_of_unknown_state_is_refused(model, plan):
    with pytest.raises(ConfigError, match=r"not know that of opt = 'adan': choose one of adam,"):
        create_optimizer(model, TrainConfig(opt="adan"))


@pytest.mark.parametrize("update", ["right", "wsi"])
def test_rules_without_a_gauge_take_any_optimizer(model, plan, update):
    config = TrainConfig(opt="adan", update=update, lr=1e-3, factor_lr=0.01)
    losses = Training(model, config)(range(8), batches=1)
    assert losses[-1] < losses[0]


def test_the_profile_names_what_moves_bases_and_gauge(model, plan):
    layers = dict(subspace_layers(model))
    optimizer = torch.optim.AdamW(model.parameters())
    GaugeFix(layers, "adamw", period=1).attach(optimizer)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        with record_function("phase.forward"):
            loss = model(images(0)).square().sum()
        loss.backward()
        with record_function("phase.update"):
            optimizer.step()
    times = part_times(recorded.events())
    assert times["forward"]["basis"] > 0
    assert times["update"]["gauge"] > 0
