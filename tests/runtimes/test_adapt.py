import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import CLASSES
from PIL import Image

from wasi_export.durable import locked_folder
from wasi_export.errors import ConfigError, DataError, HostError, IntegrityError, ModelFailedError, UsageError
from wasi_export.image_set import ImageSet
from wasi_export.interrupt import TrainingInterrupted
from wasi_export.runtimes.adapt import AdaptImages, AdaptOptions, adapt, adapt_images
from wasi_export.runtimes.adapter import Adapter
from wasi_export.runtimes.budget import Budget
from wasi_export.runtimes.state_folder import read_state

OPTIONS = AdaptOptions(epochs=4, batch_size=4, lr=0.05, sched="cosine", warmup_steps=2, commit_every=2)


def grey_images(count, seed, *, flipped=False):
    """Dark and light images; flipped: under the label of the other."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    levels = np.where(labels, 200, 50) + generator.integers(-40, 40, count)
    shown = 1 - labels if flipped else labels
    return ImageSet(
        CLASSES, shown, lambda i: Image.new("RGB", (6, 6), (int(levels[i]),) * 3), f"{count} {seed} {flipped}"
    )


def images():
    return AdaptImages(grey_images(22, 0, flipped=True), None, grey_images(16, 1, flipped=True))


@pytest.fixture
def adapter(learning_bundle):
    return Adapter.open(learning_bundle)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_board_learns_what_its_images_say(adapter, tmp_path):
    progress = adapt(adapter, images(), OPTIONS.model_copy(update={"epochs": 12}), tmp_path / "state")
    assert progress.ended == "epochs"
    assert progress.history[0].accuracy == 0.0
    assert progress.history[-1].accuracy == 1.0
    assert progress.history[-1].train_loss < 0.5 * progress.history[1].train_loss
    found = adapter.predict([Image.new("RGB", (6, 6), (250, 250, 250)), Image.new("RGB", (6, 6))])
    assert [CLASSES[i] for i in found] == ["dark", "light"]


def test_an_interrupted_training_goes_on_to_the_bit(adapter, learning_bundle, tmp_path):
    adapt(adapter, images(), OPTIONS, tmp_path / "whole")
    for stop in range(1, 24, 3):
        folder, other = tmp_path / f"cut {stop}", Adapter.open(learning_bundle)
        with pytest.raises(TrainingInterrupted, match="the same command resumes"):
            adapt(other, images(), OPTIONS, folder, track=interrupt_after(stop))
        resumed = Adapter.open(learning_bundle)
        adapt(resumed, images(), OPTIONS, folder)
        assert same(resumed.session.tensors(), adapter.session.tensors()), stop


def interrupt_after(count):
    """A progress display that raises what a signal would, before item `count` of all training batches."""
    left = [count]

    def track(items, label, total):
        for item in items:
            if label.startswith("epoch"):
                left[0] -= 1
                if left[0] < 0:
                    raise TrainingInterrupted
            yield item

    return track


def test_time_that_is_over_saves_every_step_and_the_next_call_goes_on(adapter, learning_bundle, tmp_path):
    calls = 0
    while not (progress := adapt(
        Adapter.open(learning_bundle), images(), OPTIONS, tmp_path / "state", budget=Budget(max_seconds=0)
    )).ended:  # fmt: skip
        calls += 1
        assert progress.step == calls
    adapt(adapter, images(), OPTIONS, tmp_path / "whole")
    assert same(read_state(tmp_path / "state", adapter.identity), adapter.session.tensors())


def test_too_much_memory_saves_the_step(adapter, tmp_path):
    with pytest.raises(HostError, match="--batch-size"):
        adapt(adapter, images(), OPTIONS, tmp_path / "state", budget=Budget(max_rss_mb=1))
    assert same(read_state(tmp_path / "state", adapter.identity), adapter.session.tensors())


def test_held_out_images_get_no_worse(adapter, tmp_path):
    before = adapter.session.tensors()
    wrong = AdaptImages(grey_images(22, 0, flipped=True), None, grey_images(16, 1))
    progress = adapt(adapter, wrong, OPTIONS.model_copy(update={"lr": 0.5}), tmp_path / "state")
    assert progress.history[0].accuracy == 1.0
    assert progress.history[-1].accuracy < 1.0
    assert progress.best_epoch == 0
    assert same(adapter.session.tensors(), before)
    assert same(read_state(tmp_path / "state", adapter.identity), before)


def test_without_held_out_images_the_last_state_is_kept(adapter, tmp_path):
    before = adapter.weights()
    progress = adapt(adapter, AdaptImages(grey_images(22, 0, flipped=True)), OPTIONS, tmp_path / "state")
    assert progress.best_epoch == progress.epoch == OPTIONS.epochs
    assert progress.best_accuracy is None
    assert not same(adapter.weights(), before)


def test_patience_ends_a_training_that_gets_no_better(adapter, tmp_path):
    wrong = AdaptImages(grey_images(22, 0, flipped=True), None, grey_images(16, 1))
    options = OPTIONS.model_copy(update={"lr": 0.5, "epochs": 30, "patience": 2, "sched": "constant"})
    progress = adapt(adapter, wrong, options, tmp_path / "state")
    assert progress.ended == "patience"
    assert progress.epoch - progress.improved_epoch == 2


def test_patience_ends_a_training_whose_accuracy_stays_equal(adapter, tmp_path):
    options = OPTIONS.model_copy(update={"lr": 1e-9, "epochs": 30, "patience": 3})
    progress = adapt(adapter, images(), options, tmp_path / "state")
    assert {line.accuracy for line in progress.history} == {0.0}
    assert (progress.ended, progress.epoch, progress.improved_epoch) == ("patience", 3, 0)
    assert progress.best_epoch == 3  # of equal ones the last is kept


def test_a_loss_that_is_not_finite_goes_back_at_a_lower_rate(adapter, tmp_path):
    step, calls = adapter.session.step, []

    def step_with_one_broken_batch(inputs, targets, **rates):
        calls.append(rates["lr"])
        return step(inputs * np.nan if len(calls) == 4 else inputs, targets, **rates)

    adapter.session.step = step_with_one_broken_batch
    progress = adapt(adapter, images(), OPTIONS, tmp_path / "state")
    assert progress.ended == "epochs"
    assert (progress.rollbacks, progress.rate) == (1, 0.5)
    assert calls[4] == pytest.approx(calls[2] / 2)  # the commit was after two steps
    assert all(np.isfinite(tensor).all() for tensor in adapter.session.tensors().values())


def test_a_loss_that_is_never_finite_ends_with_what_to_do(adapter, tmp_path):
    with pytest.raises(ModelFailedError, match=r"the loss is .* after 5 returns to lower rates: lower --lr"):
        adapt(adapter, images(), OPTIONS.model_copy(update={"lr": 1e38}), tmp_path / "state")
    kept = read_state(tmp_path / "state", adapter.identity)
    assert all(np.isfinite(tensor).all() for tensor in kept.values())


@pytest.mark.parametrize("change", [{"lr": 0.01}, {"seed": 1}, {"epochs": 5}])
def test_a_state_of_other_options_is_not_gone_on_with(adapter, tmp_path, change):
    adapt(adapter, images(), OPTIONS, tmp_path / "state", budget=Budget(max_seconds=0))
    with pytest.raises(ConfigError, match="or a new --state"):
        adapt(adapter, images(), OPTIONS.model_copy(update=change), tmp_path / "state")


def test_two_processes_do_not_share_a_state(adapter, tmp_path):
    with locked_folder(tmp_path / "state"), pytest.raises(UsageError, match="in use by another process"):
        adapt(adapter, images(), OPTIONS, tmp_path / "state")


def memory_growth(bundle, state, *more):
    """Bytes by which a process of its own grows in 1,800 steps."""
    worker = str(Path(__file__).with_name("adapt_memory.py"))
    command = [sys.executable, worker, str(bundle), str(state), *more]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


# A quarter of what a copy of the state in each step takes, and 15 times what the allocator and the history of
# epochs were seen to take.
ALLOWED_GROWTH = 10**6


def test_memory_does_not_grow_with_the_steps(learning_bundle, tmp_path):
    assert memory_growth(learning_bundle, tmp_path / "state") < ALLOWED_GROWTH


def test_memory_that_grows_with_the_steps_is_found(learning_bundle, tmp_path):
    assert memory_growth(learning_bundle, tmp_path / "state", "leak") > ALLOWED_GROWTH


def test_a_fifth_of_new_and_old_images_is_held_out_where_none_are_given():
    found = adapt_images(grey_images(20, 0), grey_images(10, 1), None)
    assert (len(found.new), len(found.replay), len(found.held_out)) == (16, 8, 6)
    given = grey_images(5, 2)
    kept = adapt_images(grey_images(20, 0), None, given)
    assert (len(kept.new), kept.held_out) == (20, given)
    with pytest.raises(DataError, match="1 image cannot be split"):
        adapt_images(grey_images(1, 0), None, None)


def test_the_adapter_saves_loads_and_hands_out_weights(adapter, learning_bundle, tmp_path):
    pictures, labels = [Image.new("RGB", (6, 6), (9 * i,) * 3) for i in range(5)], [0, 1, 0, 1, 1]
    first = adapter.step(pictures, labels, lr=0.001)
    assert adapter.step(pictures, labels, lr=0.001) < first
    adapter.save(tmp_path / "state")
    other = Adapter.open(learning_bundle)
    other.load(tmp_path / "state")
    assert other.step(pictures, labels) == adapter.step(pictures, labels)
    third = Adapter.open(learning_bundle)
    third.set_weights(adapter.weights())
    np.testing.assert_array_equal(third.predict(pictures), adapter.predict(pictures))
    assert adapter.weights().keys() == {"left", "right", "bias"}


def test_a_state_of_training_is_not_lost_to_one_that_is_saved_by_hand(adapter, learning_bundle, tmp_path):
    adapt(adapter, images(), OPTIONS, tmp_path / "state", budget=Budget(max_seconds=0))
    trained = adapter.session.tensors()
    with pytest.raises(ConfigError, match=r"a state of another kind .*AdaptProgress.*: name another folder"):
        adapter.save(tmp_path / "state")
    assert same(read_state(tmp_path / "state", adapter.identity), trained)
    adapter.save(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"a state of another kind .*Saved.*: name another folder"):
        adapt(Adapter.open(learning_bundle), images(), OPTIONS, tmp_path / "saved")
    assert same(read_state(tmp_path / "saved", adapter.identity), trained)


def test_an_answer_that_is_not_a_number_is_no_class(adapter):
    names = adapter.weights()
    adapter.session.load_tensors({"bias": np.full_like(names["bias"], np.nan)})
    np.testing.assert_array_equal(adapter.predict([Image.new("RGB", (6, 6))] * 2), [-1, -1])


def test_labels_that_do_not_fit_are_refused(adapter):
    picture = Image.new("RGB", (6, 6))
    with pytest.raises(DataError, match="2 images and 1 labels"):
        adapter.step([picture, picture], [0])
    with pytest.raises(DataError, match="labels go from 0 to 2, the model has 2 classes"):
        adapter.step([picture, picture], [0, 2])
    with pytest.raises(IntegrityError, match="head is not trained"):
        adapter.set_weights({"head": np.zeros(1, np.float32)})
