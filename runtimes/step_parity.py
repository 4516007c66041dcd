"""Does a training step compute the model that it trains? Its loss against that of the model's outputs."""

import numpy as np
from numpy.typing import NDArray

from wasi_export.artifact import Golden
from wasi_export.config import AdaptConfig
from wasi_export.errors import ParityError
from wasi_export.runtimes.training_session import TrainingSession


def step_parity(session: TrainingSession, golden: Golden) -> float:
    """Returns the larger error of a training session on golden images; its optimiser's state is used up.

    Of the outputs of the forward pass, over the output scale; and of the loss of a step with a rate of 0,
    over the loss. Each image has the class after the one it is taken for as its target, so the loss is large.
    """
    outputs = session.outputs(golden.images)
    scale = float(np.abs(golden.outputs).max())
    targets = np.eye(outputs.shape[1], dtype=np.float32)[(golden.outputs.argmax(1) + 1) % outputs.shape[1]]
    given = targets.argmax(1) if session.facts.settings.loss == "cross_entropy" else targets
    expected = loss_of(golden.outputs, targets, session.facts.settings)
    found = session.step(golden.images, given, lr=0.0).loss
    errors = (np.abs(outputs - golden.outputs).max() / scale, abs(found - expected) / expected)
    return float(np.max(errors)) if np.isfinite(errors).all() else float("inf")


def require_step_parity(session: TrainingSession, golden: Golden, tolerance: float) -> float:
    """Returns `step_parity` where it is within the tolerance.

    Raises:
        ParityError: it is not.
    """
    error = step_parity(session, golden)
    if error > tolerance:
        raise ParityError(
            f"the training step differs from the model by {error:.1e} of its outputs or its loss, the "
            f"tolerance is {tolerance:g}"
        )
    return error


def loss_of(outputs: NDArray[np.float32], targets: NDArray[np.float32], settings: AdaptConfig) -> float:
    """Returns the loss of outputs [B, C] for targets [B, C], one-hot where the step takes labels."""
    z, t = outputs.astype(np.float64), targets.astype(np.float64)
    if settings.loss == "mse":
        return float(((z - t) ** 2).mean())
    if settings.loss == "cross_entropy":
        t = t * (1 - settings.smoothing) + settings.smoothing / t.shape[1]
    z = z - z.max(1, keepdims=True)
    return float(-(t * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum(1).mean())
