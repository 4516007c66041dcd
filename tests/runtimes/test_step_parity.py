import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TRAINING

from wasi_export.artifact import Bundle
from wasi_export.errors import ParityError
from wasi_export.runtimes.step_parity import loss_of, require_step_parity, step_parity
from wasi_export.runtimes.training_session import TrainingSession


@pytest.fixture
def opened(learning_bundle):
    bundle = Bundle.open(learning_bundle)
    return TrainingSession.open(bundle), bundle.golden()


def test_a_step_that_fits_its_model_has_a_small_error(opened):
    session, golden = opened
    assert require_step_parity(session, golden, 1e-5) < 1e-6


@pytest.mark.parametrize("name", ["left", "right", "bias"])
def test_every_parameter_counts(opened, name):
    session, golden = opened
    session.load_tensors({name: session.tensors()[name] * 1.01 + 0.01})
    assert step_parity(session, golden) > 1e-4


def test_outputs_that_are_not_finite_are_an_infinite_error(opened):
    session, golden = opened
    session.load_tensors({"bias": np.full(2, np.nan, np.float32)})
    with pytest.raises(ParityError, match="differs from the model by inf"):
        require_step_parity(session, golden, 1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_torch(rng, smoothing):
    outputs, labels = rng.standard_normal((6, 5)).astype(np.float32), rng.integers(0, 5, 6)
    onehot = np.eye(5, dtype=np.float32)[labels]
    z, t = torch.from_numpy(outputs), torch.from_numpy(labels)
    settings = TRAINING.settings.model_copy(update={"smoothing": smoothing})
    expected = F.cross_entropy(z, t, label_smoothing=smoothing).item()
    assert loss_of(outputs, onehot, settings) == pytest.approx(expected, abs=1e-6)
    soft = rng.dirichlet(np.ones(5), 6).astype(np.float32)
    settings = TRAINING.settings.model_copy(update={"loss": "soft_targets"})
    assert loss_of(outputs, soft, settings) == pytest.approx(
        F.cross_entropy(z, torch.from_numpy(soft)).item(), abs=1e-6
    )
    settings = TRAINING.settings.model_copy(update={"loss": "mse"})
    assert loss_of(outputs, soft, settings) == pytest.approx(
        F.mse_loss(z, torch.from_numpy(soft)).item(), abs=1e-6
    )
