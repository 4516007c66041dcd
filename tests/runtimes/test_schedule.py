import pytest
import torch

from wasi_export.config import TrainConfig
from wasi_export.runtimes.schedule import learning_rate
from wasi_export.training.optim import create_scheduler


@pytest.mark.parametrize("sched", ["cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 3), (30, 20), (7, 0)])
def test_the_rates_are_those_of_training(sched, steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = create_scheduler(optimizer, TrainConfig(lr=0.1, sched=sched, warmup_steps=warmup), steps)
    for step in range(steps):
        scheduler.step_update(step)
        own = learning_rate(sched, step, lr=0.1, steps=steps, warmup=warmup)
        assert own == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
