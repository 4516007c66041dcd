"""What a step of each row of `benchmarks/training.py` takes: peak memory, time, the paper's scope, MACs.

    python benchmarks/training_cost.py < job.json     # takes the steps of one job and prints their peak

The last is for `measure_step_memory`, which runs it in a fresh process. Weights are random.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from step_measures import saved_by_layers, time_in_turns
from step_plans import CLASSES, make_plan
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from training_adapters import adapt
from training_rows import METHODS, STAGE, Adapter, Row

from wasi_export.config import ModelConfig, SubspaceConfig, TrainConfig
from wasi_export.cost import FLOAT_BYTES
from wasi_export.manifest import InputSpec
from wasi_export.ranks import Plan
from wasi_export.subspace.linear import BASIS_PERIOD
from wasi_export.training.first_part import lora_form
from wasi_export.training.ladder import saving_memory
from wasi_export.training.memory import (
    LoraJob,
    StepJob,
    draw_batch,
    make_model,
    measure_step_memory,
    take_steps,
)
from wasi_export.training.optim import create_optimizer
from wasi_export.training.processes import make_accelerator
from wasi_export.training.step import TrainingStep

with suppress(ImportError):
    import peft as peft  # else its own memory would count as that of the steps of LoRA

PROGRAM = (str(Path(__file__).resolve()),)
BATCH, THREADS = 32, 2
DEFAULT_FRACTION = 0.4  # of the rows that have none; their layers are the same


@dataclass(frozen=True)
class Shape:
    """A model and the size of its images."""

    name: str
    model: str
    size: int


SHAPES = (
    Shape("ViT-S/14, 98 px", "vit_small_patch14_dinov2", 98),
    Shape("ViT-B/32, 224 px", "vit_base_patch32_224", 224),
    Shape("Swin-T, 224 px", "swin_tiny_patch4_window7_224", 224),
)


class MethodJob(StepJob):
    """Steps of a method that need not be the pipeline's."""

    targets: Plan = Field(description="the layers that the method acts on")
    adapter: Adapter | None = None
    lora_rank: int = 0


def make_method(job: MethodJob) -> nn.Module:
    """Returns the model of a method with random weights, in training mode."""
    model = make_model(job)
    if job.adapter is not None:
        adapt(model, job.adapter, job.targets, lora_rank=job.lora_rank)
    return model


def jobs_of(row: Row, shape: Shape) -> list[MethodJob]:
    """Returns the steps of the parts of a row's training, of equal length."""
    config = SubspaceConfig.model_validate(row.subspace or {"activation": "none"})
    fraction = config.fraction or DEFAULT_FRACTION
    plan = make_plan(shape.model, fraction, mode=config.activation, size=shape.size)
    train = TrainConfig.model_validate({**STAGE, **row.train})
    job = MethodJob(
        model=ModelConfig(name=shape.model, img_size=shape.size),
        train=train,
        input=InputSpec(height=shape.size, width=shape.size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        num_classes=CLASSES,
        plan=plan if row.factored else None,
        batch_size=BATCH,
        grad_checkpointing=row.grad_checkpointing,
        targets=plan,
        lora_rank=row.lora_rank,
    )
    parts = [job.model_copy(update={"adapter": adapter}) for adapter in row.adapters or (None,)]
    if row.first_lora:
        layers = tuple(layer.name for layer in plan.factored)
        lora = LoraJob(layers=layers, rank=config.lora_rank)
        first = {"plan": None, "train": lora_form(train), "lora": lora}
        parts.insert(0, job.model_copy(update=first))
    return parts


def peak_mb(job: MethodJob) -> float:
    """Returns the measured peak of a job's steps in 10^6 bytes, of a fresh process."""
    return measure_step_memory(job, program=PROGRAM).peak_mb


def scope_mb(job: MethodJob) -> float:
    """Returns weights and saved inputs of the targeted layers in 10^6 bytes: the paper's scope, by torch."""
    with torch.device("meta"):
        model = make_method(job)
    names = {layer.name for layer in job.targets.layers}
    weights = sum(
        p.numel()
        for name in names
        for part, p in model.get_submodule(name).named_parameters()
        if not part.endswith("bias")
    )
    return (FLOAT_BYTES * weights + saved_by_layers(job, names, make=make_method)) / 1e6


def count_macs(job: MethodJob) -> float:
    """Returns the multiply-adds of all matrix products and convolutions of a step, by torch's counter.

    Bases move in one step of `BASIS_PERIOD`, of which this is the mean; factorisations (QR, eigenvectors) and
    what works element by element are not counted.
    """
    torch.manual_seed(0)
    model = make_method(job)
    optimizer = create_optimizer(model, job.train)
    step = TrainingStep(make_accelerator(), model, optimizer, job.train, seed=0)
    counts = []
    with saving_memory(model, optimizer, job.train), sdpa_kernel(SDPBackend.MATH):
        for index in range(2):  # the first moves the bases
            images, labels = draw_batch(job)
            with _ProductCounter() as counter:
                step(images, labels, index)
            counts.append(counter.macs)
    return (counts[0] + (BASIS_PERIOD - 1) * counts[1]) / BASIS_PERIOD


class _ProductCounter(TorchDispatchMode):
    """Counts by torch's formulas. Its `FlopCounterMode` hooks modules, which a recompute does not bear."""

    macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.macs += formula(*args, **(kwargs or {}), out_val=out) // 2
        return out


def step_costs(row: Row, shape: Shape) -> dict[str, Any]:
    """Returns peak and scope of each part of a row's training, and the mean of the MACs of a step."""
    jobs = jobs_of(row, shape)
    scopes, macs = [scope_mb(job) for job in jobs], [count_macs(job) for job in jobs]
    return {"scope_mb": scopes, "macs": sum(macs) / len(macs), "peak_mb": [peak_mb(job) for job in jobs]}


def step_times(names: Sequence[str], shape: Shape) -> dict[str, dict[str, list[float]]]:
    """Returns wall and processor seconds of a step of each row, round by round: means of its parts."""
    parts = {name: jobs_of(METHODS[name], shape) for name in names}
    jobs = {f"{name} {index}": job for name, found in parts.items() for index, job in enumerate(found)}
    times = time_in_turns(jobs, THREADS, make=make_method)
    means: dict[str, dict[str, list[float]]] = {}
    for name, found in parts.items():
        rounds = zip(*(times[f"{name} {index}"] for index in range(len(found))), strict=True)
        wall, cpu = zip(
            *([sum(clock) / len(found) for clock in zip(*r, strict=True)] for r in rounds), strict=True
        )
        means[name] = {"wall_s": list(wall), "cpu_s": list(cpu)}
    return means


if __name__ == "__main__":
    job = MethodJob.model_validate_json(sys.stdin.read())
    print(take_steps(job, make=lambda job: make_method(cast(MethodJob, job))).model_dump_json())
