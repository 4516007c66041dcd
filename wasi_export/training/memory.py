"""Peak memory of real training steps, measured in a process that does nothing else.

Counted is the growth of the resident set from after the imports and the making of the model's structure to
its highest during the steps: parameters, gradients, optimiser state, buffers, saved activations and the
workspace of the kernels. Not counted: the interpreter, the libraries, the data loader.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import Field

from wasi_export.artifact import InputSpec
from wasi_export.config import Frozen, ModelConfig, TrainConfig
from wasi_export.errors import HostError, ModelFailedError
from wasi_export.ranks import Plan
from wasi_export.subspace.inject import install_layers
from wasi_export.training.models import create_model
from wasi_export.training.optim import create_optimizer
from wasi_export.training.step import TrainingStep

STEPS = 3  # the first makes the optimiser's state, the second is the first with all of it
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StepMemory(Frozen):
    """Peak memory of training steps."""

    peak_mb: float = Field(description="peak resident memory over that after the imports, in 10^6 bytes")
    batch_size: int
    threads: int
    counted: str = "parameters, gradients, optimizer state, buffers, activations, workspace"


class StepJob(Frozen):
    """The steps to measure."""

    model: ModelConfig
    train: TrainConfig
    input: InputSpec
    num_classes: int
    plan: Plan | None = Field(None, description="factored layers; None: a dense model")
    batch_size: int = Field(ge=1)
    threads: int = Field(1, ge=1)


def measure_step_memory(job: StepJob) -> StepMemory:
    """Returns the peak memory of three training steps with random weights and images, in a fresh process.

    The allocator of that process gives freed memory back at once, so that the figure follows what is alive
    and repeats within about a percent.

    Raises:
        HostError: this system does not tell a process its peak memory.
        ModelFailedError: the steps failed; the message is the process's last line.
    """
    if not (_STATUS.exists() and _CLEAR.exists()):
        raise HostError("peak training memory is read from /proc, which this system lacks: measure on Linux")
    environment = os.environ | {
        "OMP_NUM_THREADS": str(job.threads),
        # Fixed thresholds: by default glibc raises them with use and keeps ever more freed memory.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-m", "wasi_export.training.memory"],
        input=job.model_dump_json(),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelFailedError(f"measuring training memory ended with {done.returncode}: {last}")
    return StepMemory.model_validate_json(done.stdout.splitlines()[-1])


def take_steps(job: StepJob) -> StepMemory:
    """Takes the steps in this process and returns what they needed; to be called right after the imports."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    before = _resident_bytes("VmRSS")
    bare = job.model.model_copy(update={"pretrained": False, "checkpoint": None})
    model = create_model(bare, job.num_classes).train()
    if job.plan is not None:
        install_layers(model, job.plan)
    # The dense weights that the factors replaced are gone; they are not to count.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # sets the peak back to the present, see proc(5)
    accelerator = Accelerator(cpu=True)
    step = TrainingStep(
        accelerator,
        accelerator.prepare(model),
        accelerator.prepare(create_optimizer(model, job.train)),
        job.train,
        seed=0,
    )
    shape = (job.batch_size, job.input.channels, job.input.height, job.input.width)
    for index in range(STEPS):
        step(torch.randn(shape), torch.randint(job.num_classes, (job.batch_size,)), index)
    peak = _resident_bytes("VmHWM") - before
    return StepMemory(peak_mb=peak / 1e6, batch_size=job.batch_size, threads=job.threads)


def _resident_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(take_steps(StepJob.model_validate_json(sys.stdin.read())).model_dump_json() + "\n")
