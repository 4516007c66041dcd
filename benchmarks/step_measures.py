"""What training steps of several jobs take: time, in turns, and what their layers keep."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from wasi_export.training.accounting import MemoryAccount
from wasi_export.training.ladder import saving_memory
from wasi_export.training.memory import StepJob, draw_batch, make_model
from wasi_export.training.optim import create_optimizer
from wasi_export.training.processes import make_accelerator
from wasi_export.training.step import TrainingStep

Make = Callable[[Any], nn.Module]
"""Makes the model of a job."""


def time_in_turns(
    jobs: Mapping[str, StepJob], threads: int, *, rounds: int = 4, make: Make = make_model
) -> dict[str, list[tuple[float, float]]]:
    """Returns wall and processor seconds of single steps of all jobs, taken in turns in this process.

    The first round is not among them.
    """
    torch.set_num_threads(threads)
    steps: dict[str, Callable[[int], None]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    with ExitStack() as switches:
        for name, job in jobs.items():
            torch.manual_seed(0)
            model = make(job)
            optimizer = create_optimizer(model, job.train)
            switches.enter_context(saving_memory(model, optimizer, job.train))
            steps[name] = _step(TrainingStep(make_accelerator(), model, optimizer, job.train, seed=0), job)
        for index in range(rounds):
            for name, step in steps.items():
                wall, cpu = time.perf_counter(), time.process_time()
                step(index)
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: taken[1:] for name, taken in times.items()}


def _step(step: TrainingStep, job: StepJob) -> Callable[[int], None]:
    images, labels = draw_batch(job)

    def take(index: int) -> None:
        step(images, labels, index)

    return take


def saved_by_layers(job: StepJob, names: set[str], *, make: Make = make_model) -> int:
    """Returns the bytes that some layers keep from a forward pass, without parameters."""
    with torch.device("meta"):
        model = make(job)
    kept: dict[int, torch.UntypedStorage] = {}
    total = 0
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryAccount():
        model = model.to_empty(device="cpu")
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                kept[storage._cdata] = storage
            return tensor

        context = saved_tensors_hooks(pack, lambda tensor: tensor)

        def enter(*_: object) -> None:
            context.__enter__()

        def leave(*_: object) -> None:
            nonlocal total
            context.__exit__()
            total += sum(storage.nbytes() for storage in kept.values())
            kept.clear()

        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        model(draw_batch(job)[0])
    return total
