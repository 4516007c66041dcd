import contextlib
import os
import signal

import pytest
import torch

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError, IntegrityError
from wasi_export.interrupt import TrainingInterrupted, stop_signals
from wasi_export.training.models import create_model
from wasi_export.training.optim import create_optimizer
from wasi_export.training.resume import (
    CHECKPOINT,
    EpochMetrics,
    Position,
    position_to_resume,
    restore,
    save_position,
)

METRICS = EpochMetrics(
    epoch=1,
    step=7,
    train_loss=0.1 + 0.2,
    val_loss=1 / 3,
    val_accuracy=0.5,
    lr=1e-4,
    seconds=1.5,
    cpu_seconds=1.25,
    images_per_second=10.0,
)
POSITION = Position(key="k", epoch=1, batch=2, step=9, loss_sum=2 / 3, history=(METRICS,))


def trained(model, opt="adamw", steps=2):
    optimizer = create_optimizer(model, TrainConfig(opt=opt, lr=1e-2))
    for _ in range(steps):
        model(torch.randn(2, 1, 16, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("opt", ["adamw", "sgd", "adabelief"])
def test_a_restored_training_is_where_it_was(tiny, model, tmp_path, opt):
    optimizer = trained(model, opt)
    model.register_buffer("basis", torch.randn(3, 3), persistent=False)
    save_position(tmp_path / CHECKPOINT, POSITION, model, optimizer)

    other = create_model(tiny().model, 10)
    other.register_buffer("basis", torch.zeros(3, 3), persistent=False)
    other_optimizer = create_optimizer(other, TrainConfig(opt=opt, lr=1e-2))
    found = position_to_resume(tmp_path / CHECKPOINT, "k")
    restore(tmp_path / CHECKPOINT, found, other, other_optimizer)

    assert found.model_copy(update={"optimizer_numbers": {}}) == POSITION
    assert torch.equal(other.basis, model.basis)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    state, other_state = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert state.keys() == other_state.keys()
    for index, values in state.items():
        for name, value in values.items():
            torch.testing.assert_close(other_state[index][name], value, rtol=0, atol=0)


def test_nothing_begun_is_no_position(tmp_path):
    assert position_to_resume(tmp_path / CHECKPOINT, "k") is None


def test_a_checkpoint_of_another_configuration_is_refused(model, tmp_path):
    save_position(tmp_path / CHECKPOINT, POSITION, model, trained(model))
    with pytest.raises(ConfigError, match=r"key k, this is other\).*--force"):
        position_to_resume(tmp_path / CHECKPOINT, "other")


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"{}" + data])
def test_a_damaged_checkpoint_is_a_clear_error(model, tmp_path, damage):
    path = tmp_path / CHECKPOINT
    save_position(path, POSITION, model, trained(model))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(IntegrityError, match="not a checkpoint of a training run"):
        position_to_resume(path, "k")


def test_a_checkpoint_of_another_model_is_refused(tiny, model, tmp_path):
    save_position(tmp_path / CHECKPOINT, POSITION, model, trained(model))
    deeper = create_model(tiny("model.kwargs.depth=3").model, 10)
    with pytest.raises(IntegrityError, match=r"does not fit the model in 12 tensors \(blocks.2"):
        restore(tmp_path / CHECKPOINT, POSITION, deeper, create_optimizer(deeper, TrainConfig()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_ends_the_work_between_two_items(number):
    seen = []

    def work():
        with stop_signals() as signals:
            for item in signals.guard(range(5)):
                seen.append(item)
                if item == 1:
                    os.kill(os.getpid(), number)
                    seen.append("after the signal")

    with pytest.raises(TrainingInterrupted):
        work()
    assert seen == [0, 1, "after the signal"]


def test_all_processes_stop_before_the_same_round():
    """The second has fewer items, and asks as often; the signal comes to the first alone."""
    asked, received = [], []

    def rounds_of(items, total):
        votes = []
        with (
            stop_signals(lambda own: votes.append(own) or len(votes) == 4) as signals,
            contextlib.suppress(TrainingInterrupted),
        ):
            received.append(list(signals.guard(items, total)))
        asked.append(len(votes))

    rounds_of(range(3), 3)
    rounds_of(range(2), 3)
    rounds_of(range(5), 5)
    assert asked == [3, 3, 4]
    assert received == [[0, 1, 2], [0, 1]]


@pytest.fixture
def _interruptible():
    """Ctrl-C as in a terminal: a shell starts background jobs, such as a CI's, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_ctrl_c_acts_at_once():
    def press_twice():
        with stop_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal did nothing")

    with pytest.raises(KeyboardInterrupt) as error:
        press_twice()
    assert not isinstance(error.value, TrainingInterrupted)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
