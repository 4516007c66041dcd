import pytest
from torch import nn

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.training.optim import SCHEDULES, create_optimizer, create_scheduler, parameter_groups


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
def test_a_schedule_is_a_function_of_the_step_alone(sched):
    config = TrainConfig(lr=1.0, warmup_steps=2, sched=sched)
    optimizer = create_optimizer(nn_with_head(), config)
    create_scheduler(optimizer, config, 10).step_update(7)
    assert optimizer.param_groups[0]["lr"] == rates(config, 10)[7]
