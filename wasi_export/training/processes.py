"""Training on several processes: what every process does alike, and what the main one does for all.

One process a device, each with the whole model (torch's DistributedDataParallel, through accelerate):

    images       every batch is cut into equal shares, one a process, so `data.batch_size` is that of a step
                 whatever the number of processes; evaluation deals out whole batches
    factors      the main process factors the model, the others install its plan; parameters and buffers are
                 broadcast before the first step, gradients are averaged in every step
    bases        all processes compress in the same ones, which follow the inputs of all: the moments that
                 move them are summed (`SubspaceLinear.share_bases`)
    files        the main process writes; all read. The run folder must be the same for all of them

As the mean of equal shares' means is the mean over the batch, the losses are those of one process but for
the order of sums, and for what each process draws for itself: dropout, stochastic depth, mixup.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from torch.utils.data import DataLoader

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError, WasiExportError

T = TypeVar("T")


def make_accelerator() -> Accelerator:
    """Returns the accelerator of this process; the launcher's environment tells how many there are."""
    return Accelerator(
        # Without this, accelerate ignores torchrun's processes where there is no GPU: each would train alone.
        cpu=not torch.accelerator.is_available(),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # A static graph may have parameters that get no gradient; the views save a copy of the gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True, gradient_as_bucket_view=True)],
    )


def check_shares(batch_size: int, config: TrainConfig, *, processes: int) -> None:
    """Checks that a batch of this size can be shared out, and that its gradients will be averaged.

    Raises:
        ConfigError: the shares would not be equal, mixup would meet an odd one, or parameters would be
            updated before their gradients are averaged.
    """
    if processes == 1:
        return
    if batch_size % processes:
        raise ConfigError(
            f"a batch of {batch_size} images cannot be shared by {processes} processes: data.batch_size "
            "counts the images of all of them and must be a multiple of their number"
        )
    if (config.mixup or config.cutmix) and batch_size // processes % 2:
        raise ConfigError(
            f"mixup pairs the images of a process: data.batch_size must be a multiple of {2 * processes} on "
            f"{processes} processes, got {batch_size}"
        )
    if config.memory.update_in_backward:
        raise ConfigError(
            "memory.update_in_backward updates before the gradients of the processes are averaged: switch "
            f"it off, or train on one process instead of {processes}"
        )


def share_evaluation(loader: DataLoader[T], *, processes: int, index: int) -> Iterable[T]:
    """Returns the batches of one process: each batch goes to one process, whole and once."""
    if processes == 1:
        return loader
    shared: Iterable[T] = prepare_data_loader(
        loader, num_processes=processes, process_index=index, even_batches=False
    )
    return shared


def largest_share(batches: int, *, processes: int) -> int:
    """Returns how many of so many batches the process that has most of them gets."""
    return -(-batches // processes)


def sum_over_processes(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Returns the sums over all processes, in fp64; the values themselves where there is one process."""
    if accelerator.num_processes == 1:
        return list(values)
    sums: torch.Tensor = accelerator.reduce(torch.tensor(values, dtype=torch.float64).to(accelerator.device))
    return sums.tolist()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Returns, on every process, what the work gives on the main one, which alone does it.

    Raises:
        WasiExportError: the work raised it; every process raises it, so that none waits for another.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except WasiExportError as caught:
            outcome = [None, caught]
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def is_main_process() -> bool:
    """Returns whether this process is the one that writes and prints; to be asked after the training."""
    main: bool = PartialState().is_main_process
    return main


def leave_processes() -> None:
    """Ends the work of this process with the others, as the last thing it does."""
    PartialState().destroy_process_group()


def main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Returns what the work gives on this process; the main one does it first, for files that it makes.

    Raises:
        WasiExportError: the work raised it on the main process, or here.
    """
    if accelerator.is_main_process:
        result: list[T] = []
        on_main(accelerator, lambda: result.append(work()))
        return result[0]
    on_main(accelerator, lambda: None)
    return work()
