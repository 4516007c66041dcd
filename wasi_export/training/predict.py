"""Peak memory of a training step, predicted without the memory and without computing.

The very steps that `memory.py` measures run on torch's fake tensors, which have shapes and storages but no
data, while `accounting.py` follows the storages. What that cannot see is added by formula: the buffers that
kernels take for themselves, and what the process grows by when they are first called.
"""

import torch
from pydantic import Field
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wasi_export.settings import Frozen
from wasi_export.training.accounting import MemoryAccount, count_memory
from wasi_export.training.ladder import saving_memory
from wasi_export.training.memory import StepJob, draw_batch, make_model
from wasi_export.training.optim import create_optimizer
from wasi_export.training.processes import make_accelerator
from wasi_export.training.profile import Phases, unmeasured
from wasi_export.training.step import TrainingStep

STEPS = 2  # the second is the first with all of the optimiser's state
KERNEL_BYTES = 10_000_000


class PredictedMemory(Frozen):
    """Predicted peak of a training step; figures in 10^6 bytes."""

    peak_mb: float = Field(description="the sum of what follows")
    parameters_mb: float = Field(description="parameters and buffers")
    optimizer_mb: float
    gradients_mb: float = Field(description="accumulated at the moment of the peak")
    inputs_mb: float = Field(description="the batch")
    activations_mb: float = Field(description="saved activations and workspace at the moment of the peak")
    kernels_mb: float = Field(description="what kernels and libraries take for themselves, by formula")
    saved_mb: float = Field(description="activations that the forward pass keeps; not in the sum")


def predict_step_memory(job: StepJob) -> PredictedMemory:
    """Returns the predicted peak memory of the steps that `measure_step_memory` would measure.

    Raises:
        ConfigError: the job's training does not fit its model.
    """
    with torch.device("meta"):
        model = make_model(job)
    # The batch and what is made of it are fake from the start; the parameters become so here.
    with FakeTensorMode(allow_non_fake_inputs=True):
        account = count_steps(job, model.to_empty(device="cpu"), fake=True)
    peak = account.peak
    return PredictedMemory(
        peak_mb=(peak.total + KERNEL_BYTES) / 1e6,
        parameters_mb=peak.parameters / 1e6,
        optimizer_mb=peak.optimizer / 1e6,
        gradients_mb=peak.gradients / 1e6,
        inputs_mb=peak.inputs / 1e6,
        activations_mb=peak.activations / 1e6,
        kernels_mb=KERNEL_BYTES / 1e6,
        saved_mb=account.saved_bytes / 1e6,
    )


def count_steps(
    job: StepJob, model: nn.Module, *, fake: bool = False, phase: Phases = unmeasured
) -> MemoryAccount:
    """Returns torch's account of the steps of a job, taken by this model in this process.

    Args:
        job: the steps.
        model: of `make_model`.
        fake: parts of a batch that need what others need may be left out.
        phase: times the phases of the steps.
    """
    optimizer = create_optimizer(model, job.train)
    step = TrainingStep(make_accelerator(), model, optimizer, job.train, seed=0, phase=phase)
    with saving_memory(model, optimizer, job.train), count_memory(model, optimizer) as account:
        for index in range(STEPS):
            images, labels = draw_batch(job)
            account.count(images, "inputs")
            size = _images_to_run(job) if fake else job.batch_size
            step(images[:size], labels[:size], index)
            del images, labels
    return account


def _images_to_run(job: StepJob) -> int:
    """Returns a smaller batch whose parts have the same sizes, even or odd as the whole one is."""
    size = job.train.memory.micro_batch
    if size is None or job.batch_size <= 4 * size:
        return job.batch_size
    return 2 * size + (job.batch_size - 2 * size) % (2 * size)
