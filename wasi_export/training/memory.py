"""Peak memory of real training steps, measured in a process that does nothing else.

Counted is the growth of the resident set from after the imports and the making of the model's structure to
its highest during the steps: parameters, gradients, optimiser state, buffers, saved activations and the
workspace of the kernels. Not counted: the interpreter, the libraries, the data loader.
"""

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import nn

from wasi_export.config import ModelConfig, TrainConfig
from wasi_export.errors import HostError, ModelFailedError
from wasi_export.manifest import InputSpec
from wasi_export.ranks import Plan
from wasi_export.settings import Frozen
from wasi_export.subspace.inject import install_layers, subspace_layers
from wasi_export.subspace.lora import add_lora
from wasi_export.training.ladder import saving_memory
from wasi_export.training.models import create_model, head_modules
from wasi_export.training.optim import create_optimizer
from wasi_export.training.step import TrainingStep

PROGRAM = ("-m", "wasi_export.training.memory")
STEPS = 3  # the first makes the optimiser's state, the second is the first with all of it
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class StepMemory(Frozen):
    """Peak memory of training steps."""

    peak_mb: float = Field(description="peak resident memory over that after the imports, in 10^6 bytes")
    process_mb: float = Field(description="peak resident memory of the whole process, libraries included")
    step_seconds: float = Field(description="wall time of the last step")
    step_cpu_seconds: float = Field(description="processor time of the last step")
    batch_size: int
    threads: int
    counted: str = "parameters, gradients, optimizer state, buffers, activations, workspace"


class LoraJob(Frozen):
    """Layers that bear changes, beside which all but the head is frozen."""

    layers: tuple[str, ...]
    rank: int = Field(ge=1)


class StepJob(Frozen):
    """The steps to measure."""

    model: ModelConfig
    train: TrainConfig
    input: InputSpec
    num_classes: int
    plan: Plan | None = Field(None, description="factored layers; None: a dense model")
    lora: LoraJob | None = Field(None, description="of the epochs before layers are factored")
    batch_size: int = Field(ge=1)
    threads: int = Field(1, ge=1)
    grad_checkpointing: bool = Field(
        False, description="timm's own, to compare with; not one of our switches"
    )


def measure_step_memory(job: StepJob, *, program: Sequence[str] = PROGRAM) -> StepMemory:
    """Returns the peak memory of three training steps with random weights and images, in a fresh process.

    The allocator of that process gives freed memory back at once, so that the figure follows what is alive
    and repeats within about a percent.

    Args:
        job: the steps.
        program: arguments of Python; reads a job, calls `take_steps` and prints what that returns.

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
        [sys.executable, *program],
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


def take_steps(job: StepJob, *, make: Callable[[StepJob], nn.Module] | None = None) -> StepMemory:
    """Takes the steps in this process and returns what they needed; to be called right after the imports.

    Args:
        job: the steps.
        make: makes the model; None: `make_model`.
    """
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    _warm_up(job)
    _release()
    before = _resident_bytes("VmRSS")
    model = (make or make_model)(job)
    # The dense weights that the factors replaced are gone; they are not to count.
    _release()
    _CLEAR.write_text("5")  # sets the peak back to the present, see proc(5)
    wall, cpu = _take(job, model)
    peak = _resident_bytes("VmHWM")
    return StepMemory(
        peak_mb=(peak - before) / 1e6,
        process_mb=peak / 1e6,
        step_seconds=wall,
        step_cpu_seconds=cpu,
        batch_size=job.batch_size,
        threads=job.threads,
    )


def _take(job: StepJob, model: nn.Module) -> tuple[float, float]:
    """Takes the steps of a job; returns wall and processor time of the last in seconds."""
    accelerator = Accelerator(cpu=True)
    optimizer = create_optimizer(model, job.train)
    step = TrainingStep(
        accelerator, accelerator.prepare(model), accelerator.prepare(optimizer), job.train, seed=0
    )
    with saving_memory(model, optimizer, job.train):
        for index in range(STEPS):
            images, labels = draw_batch(job)
            began = time.perf_counter(), time.process_time()
            step(images, labels, index)
            del images, labels  # two batches are not to be counted
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _warm_up(job: StepJob) -> None:
    """Takes steps of a small dense model, so that kernels and libraries are loaded and have their buffers."""
    small = ModelConfig(
        name="vit_tiny_patch16_224", img_size=32, kwargs={"embed_dim": 64, "depth": 1, "num_heads": 1}
    )
    train = TrainConfig(opt=job.train.opt, clip_grad=job.train.clip_grad)
    size = InputSpec(height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    warm = job.model_copy(
        update={"model": small, "train": train, "input": size, "plan": None, "lora": None, "batch_size": 2}
    )
    _take(warm, make_model(warm))


def _release() -> None:
    """Gives back to the system what nothing refers to."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def make_model(job: StepJob) -> nn.Module:
    """Returns the model of a job with random weights, in training mode."""
    bare = job.model.model_copy(update={"pretrained": False, "checkpoint": None})
    model = create_model(bare, job.num_classes).train()
    if job.grad_checkpointing:
        cast(Any, model).set_grad_checkpointing()
    if job.plan is not None:
        install_layers(model, job.plan)
        for _, layer in subspace_layers(model):
            layer.reset_parameters()
    if job.lora is not None:
        add_lora(model, job.lora.layers, job.lora.rank, trained=head_modules(model))
    return model


def draw_batch(job: StepJob) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random images [B, C, H, W] and labels [B]."""
    shape = (job.batch_size, job.input.channels, job.input.height, job.input.width)
    return torch.randn(shape), torch.randint(job.num_classes, (job.batch_size,))


def _resident_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(take_steps(StepJob.model_validate_json(sys.stdin.read())).model_dump_json() + "\n")
