import numpy as np
import pytest
from helpers import SIZE, TRAINING, factors
from safetensors.numpy import save_file
from training_step_text import MOMENTS, NAMES, numpy_step

from wasi_export.artifact import Bundle
from wasi_export.errors import IntegrityError, ModelFailedError, UsageError
from wasi_export.manifest import PARAMETERS
from wasi_export.runtimes.training_session import TrainingSession


@pytest.fixture
def session(learning_bundle):
    return TrainingSession.open(Bundle.open(learning_bundle))


def batches(rng, sizes):
    for size in sizes:
        yield rng.standard_normal((size, 3, SIZE, SIZE), np.float32), rng.integers(0, 2, size)


def start():
    state = {name: value.astype(np.float64) for name, value in factors().items()}
    return state | {f"{name}.momentum_buffer": np.zeros_like(state[name]) for name in NAMES}


def test_steps_in_place_are_those_of_the_formula_at_every_batch_size(session, rng):
    state = start()
    for images, labels in batches(rng, (1, 4, 7, 2, 4)):
        rates = {"lr": 0.3, "weight_decay": 0.1, "clip_norm": 0.5}
        loss, state = numpy_step(state, images, labels, **rates)
        result = session.step(images, labels, **rates)
        assert result.loss == pytest.approx(loss, abs=1e-6)
    for name, tensor in session.tensors().items():
        np.testing.assert_allclose(tensor, state[name], atol=1e-6)


def test_outputs_are_those_of_the_parameters_as_they_are_now(session, rng):
    (images, labels), *_ = batches(rng, (5,))
    before = session.outputs(images)
    result = session.step(images, labels, lr=0.5)
    assert result.correct == (before.argmax(1) == labels).sum()
    after = session.outputs(images)
    state = session.tensors()
    expected = images.reshape(5, -1) @ state["right"].T @ state["left"].T + state["bias"]
    np.testing.assert_allclose(after, expected, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


def test_tensors_are_copies_that_a_step_leaves_alone(session, rng):
    before = session.tensors()
    kept = {name: tensor.copy() for name, tensor in before.items()}
    for images, labels in batches(rng, (4, 4)):
        session.step(images, labels, lr=0.3)
    for name in kept:
        np.testing.assert_array_equal(before[name], kept[name])


def test_a_state_that_was_taken_over_goes_on_to_the_bit(session, learning_bundle, rng):
    data = list(batches(rng, (4, 2, 3, 4)))
    for images, labels in data[:2]:
        session.step(images, labels, lr=0.3)
    other = TrainingSession.open(Bundle.open(learning_bundle))
    other.load_tensors(session.tensors())
    for images, labels in data[2:]:
        assert session.step(images, labels, lr=0.3) == other.step(images, labels, lr=0.3)
    for name, tensor in session.tensors().items():
        np.testing.assert_array_equal(tensor, other.tensors()[name])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"left": np.zeros((2, 3), np.float32)}, r"left \[2, 3\] against \[2, 2\]"),
        ({"lefft": np.zeros((2, 2), np.float32)}, "lefft"),
    ],
)
def test_a_state_of_another_step_is_refused_and_changes_nothing(session, tensors, message):
    before = session.tensors()
    with pytest.raises(IntegrityError, match=message):
        session.load_tensors({"bias": np.ones(2, np.float32), **tensors})
    for name, tensor in session.tensors().items():
        np.testing.assert_array_equal(tensor, before[name])


def test_a_bundle_without_a_step_says_how_to_get_one(finished_bundle):
    with pytest.raises(UsageError, match="export it again with --train-graph"):
        TrainingSession.open(Bundle.open(finished_bundle))


def test_parameters_that_are_not_those_of_the_graph_are_refused(learning_bundle, tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("step.onnx", "evaluate.onnx"):
        (tmp_path / "train" / name).write_bytes((learning_bundle / "train" / name).read_bytes())
    wrong = factors() | {"left": np.zeros((2, 5), np.float32)}
    save_file(wrong, tmp_path / PARAMETERS)
    with pytest.raises(IntegrityError, match=r"needs left \[2, 2\], its state has \[2, 5\]"):
        TrainingSession.load(tmp_path, TRAINING)


def test_images_of_another_size_are_a_clear_error(session):
    with pytest.raises(ModelFailedError, match=r"training step failed on images \[1, 3, 9, 9\]"):
        session.step(np.zeros((1, 3, 9, 9), np.float32), np.zeros(1, np.int64), lr=0.1)
    with pytest.raises(ModelFailedError, match=r"failed on images \[1, 3, 9, 9\]"):
        session.outputs(np.zeros((1, 3, 9, 9), np.float32))


def test_the_optimiser_starts_at_zero(session):
    for name in MOMENTS:
        assert not session.tensors()[name].any()
