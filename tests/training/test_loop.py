"""Real training on digits. The interruptions are real signals, sent between two steps of an epoch."""

import json
import os
import signal

import pytest
import torch

from wasi_export.datasets import load_data
from wasi_export.errors import ConfigError, ModelFailedError
from wasi_export.interrupt import TrainingInterrupted
from wasi_export.run_folder import WEIGHTS
from wasi_export.subspace.inject import factorize_model
from wasi_export.training.data import make_loader, random_numbers
from wasi_export.training.loop import METRICS, evaluate, fit
from wasi_export.training.models import create_model, input_spec
from wasi_export.training.resume import CHECKPOINT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # fork
]


class Training:
    """One training of the tiny model, from scratch each time it is called."""

    def __init__(self, config, digits, *, factored=False):
        self.config, self.digits, self.factored = config, digits, factored

    def __call__(self, run_dir=None, track=lambda items, label, total: items, key="k", epochs=None):
        with random_numbers(0):
            model = create_model(self.config.model, 10)
        spec = input_spec(model, self.config)
        train, val = self.digits
        if self.factored:
            batches = [images for images, _ in make_loader(train, spec, self.config.data, training=False)]
            factorize_model(model, batches, self.config.subspace, total=len(batches))
        history = fit(
            model,
            make_loader(train, spec, self.config.data, training=True),
            make_loader(val, spec, self.config.data, training=False),
            self.config.train.dense,
            run_dir,
            seed=0,
            epochs=epochs,
            key=key,
            track=track,
        )
        return model, history


def interrupt_at(wanted_label, wanted_item, number=signal.SIGINT):
    """Returns a `Track` that sends a signal during one item of the work with this label."""

    def track(items, label, total):
        for index, item in enumerate(items):
            if label == wanted_label and index == wanted_item:
                os.kill(os.getpid(), number)
            yield item

    return track


def without_times(history):
    times = {"seconds": 0.0, "cpu_seconds": 0.0, "images_per_second": 0.0}
    return [metrics.model_copy(update=times) for metrics in history]


def assert_same(result, expected):
    (model, history), (other, other_history) = result, expected
    assert without_times(history) == without_times(other_history)
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    assert [name for name in state if not torch.equal(state[name], other_state[name])] == []


def test_training_learns_and_reports_every_epoch(tiny, tmp_path):
    config = tiny(
        "train.dense.epochs=8",
        "train.dense.lr=3e-3",
        "data.train_images=400",
        "data.val_images=100",
        "data.augment=false",
    )
    images = load_data(config.data)
    model, history = Training(config, images)(tmp_path)
    assert [metrics.epoch for metrics in history] == list(range(1, 9))
    assert [metrics.step for metrics in history] == list(range(25, 201, 25))
    assert history[-1].train_loss < 0.8 * history[0].train_loss
    assert history[-1].val_accuracy > 0.4  # chance is 0.1, with a standard error of 0.03
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [metrics.model_dump() for metrics in history]
    val = make_loader(images[1], input_spec(model, config), config.data, training=False)
    assert evaluate(model, val).accuracy == history[-1].val_accuracy


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("factored", [False, True], ids=["dense", "subspace"])
def test_an_interrupted_training_resumes_to_the_same_bits(tiny, digits, tmp_path, workers, factored):
    config = tiny(f"data.workers={workers}", "model.kwargs.drop_path_rate=0.2")
    training = Training(config, digits, factored=factored)
    with pytest.raises(TrainingInterrupted, match=r"epoch 2, step 7: saved .*the same command resumes"):
        training(tmp_path, interrupt_at("epoch 2/2", 2))
    assert (tmp_path / CHECKPOINT).exists()
    assert_same(training(tmp_path), training())


def test_a_training_interrupted_again_and_again_comes_to_the_same(tiny, digits, tmp_path):
    training = Training(tiny("train.dense.mixup=0.2"), digits)
    stops = (("epoch 1/2", 0), ("epoch 1/2", 0), ("evaluate", 0), ("epoch 2/2", 3))
    for label, item in stops:
        with pytest.raises(TrainingInterrupted):
            training(tmp_path, interrupt_at(label, item, signal.SIGTERM))
    assert_same(training(tmp_path), training())


def test_the_number_of_workers_does_not_matter(tiny, digits):
    assert_same(Training(tiny("data.workers=0"), digits)(), Training(tiny("data.workers=2"), digits)())


def test_a_finished_training_is_not_done_again(tiny, digits, tmp_path):
    training = Training(tiny(), digits)
    expected = training(tmp_path)
    labels = []

    def track(items, label, total):
        labels.append(label)
        return items

    assert_same(training(tmp_path, track), expected)
    assert labels == []


def test_a_checkpoint_of_another_configuration_is_refused(tiny, digits, tmp_path):
    training = Training(tiny(), digits)
    training(tmp_path, key="k")
    with pytest.raises(ConfigError, match="of another configuration"):
        training(tmp_path, key="another")


def test_without_a_folder_nothing_is_written(tiny, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingInterrupted, match="nothing is kept"):
        Training(tiny(), digits)(None, interrupt_at("epoch 1/2", 1))
    assert list(tmp_path.iterdir()) == []


def test_another_seed_is_another_training(tiny, digits):
    (first, _), (second, _) = Training(tiny("data.batch_size=8"), digits)(), Training(tiny(), digits)()
    assert not torch.equal(first.head.weight, second.head.weight)


def test_no_epochs_keep_the_initial_weights(tiny, digits, tmp_path):
    model, history = Training(tiny("train.dense.epochs=0"), digits)(tmp_path)
    with random_numbers(0):
        expected = create_model(tiny().model, 10)
    assert history == ()
    assert torch.equal(model.head.weight, expected.head.weight)
    assert not (tmp_path / WEIGHTS).exists()


def test_later_epochs_alone_have_the_steps_and_rates_of_their_place_in_the_schedule(tiny, digits):
    config = tiny("train.dense.epochs=3")
    *_, expected = Training(config, digits)()[1]
    (last,) = Training(config, digits)(epochs=range(2, 3))[1]
    assert (last.epoch, last.step, last.lr) == (expected.epoch, expected.step, expected.lr)


def test_mixup_needs_an_even_batch(tiny, digits):
    with pytest.raises(ConfigError, match=r"batch_size must be even, got 15"):
        Training(tiny("train.dense.mixup=0.2", "data.batch_size=15"), digits)()


def test_a_loss_that_is_not_finite_ends_the_training(tiny, digits):
    config = tiny("train.dense.lr=1e30", "train.dense.opt=sgd", "train.dense.warmup_steps=0")
    with pytest.raises(
        ModelFailedError, match=r"training loss is (nan|inf) at step \d+: lower the learning rate"
    ):
        Training(config, digits)()


def test_evaluation_leaves_the_mode_and_counts_all_images(model, tiny, digits):
    config = tiny("data.eval_batch_size=7")
    loader = make_loader(digits[1], input_spec(model, config), config.data, training=False)
    result = evaluate(model.train(), loader)
    assert result.count == len(digits[1]) == 40
    assert model.training
    with torch.no_grad():
        logits = model.eval()(torch.cat([images for images, _ in loader]))
    labels = torch.cat([labels for _, labels in loader])
    assert result.accuracy == int((logits.argmax(1) == labels).sum()) / 40
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
