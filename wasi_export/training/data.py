"""Batches of an `ImageSet`, through timm's transforms.

Everything random about a sample follows from (seed, epoch, index) and everything random about the order
from (seed, epoch). So the batches are the same for any number of workers, and a run that resumes in the
middle of an epoch sees what the uninterrupted run saw.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from wasi_export.config import DataConfig
from wasi_export.image_set import ImageSet
from wasi_export.manifest import InputSpec

Transform = Callable[[Image.Image], Tensor]
Batch = tuple[Tensor, Tensor]
"""Images [B, C, H, W] and labels [B], or soft labels [B, classes] after mixup."""


@dataclass(frozen=True)
class Draw:
    """One image in one epoch."""

    epoch: int
    index: int


class TransformedImages(Dataset[Any]):
    """An `ImageSet` as torch's data set: indexed by `Draw`, gives (C, H, W) tensors and labels."""

    def __init__(self, images: ImageSet, transform: Transform, *, channels: int, seed: int) -> None:
        """Makes the data set; one channel reads the images as grey, three as RGB."""
        self.images, self.transform, self.seed = images, transform, seed
        self.mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        image, label = self.images[draw.index]
        with random_numbers(self.seed, draw.epoch, draw.index):
            return self.transform(image.convert(self.mode)), label


class EpochBatches(Sampler[list[Draw]]):
    """Batches of one epoch, from any batch of it on; shuffled by (seed, epoch), or in order.

    Training drops the last batch where it is not full, as timm does, unless it is the only one: every
    epoch draws another order, so no image is left out for good. In order, nothing is dropped.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, shuffle: bool) -> None:
        """Makes the batches of `count` images."""
        self.count, self.batch_size = count, min(batch_size, count)
        self.seed, self.shuffle = seed, shuffle
        self.drop_last = shuffle
        self._epoch, self._start = 0, 0

    def go_to(self, epoch: int, batch: int = 0) -> None:
        """Sets what the next iteration gives: the epoch, from this batch on.

        (Not `set_epoch`: accelerate's loader calls a method of that name with its own count.)
        """
        self._epoch, self._start = epoch, batch

    def __len__(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self._epoch)).permutation(self.count)
        for batch in range(self._start, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [Draw(self._epoch, int(index)) for index in indices]


def make_loader(
    images: ImageSet, spec: InputSpec, config: DataConfig, *, training: bool, seed: int = 0
) -> DataLoader[Batch]:
    """Returns batches of (images [B, C, H, W], labels [B]).

    Training shuffles, augments where the config says so, and drops a last batch that is not full.
    Evaluation does none of these.
    """
    augment = training and config.augment
    batches = EpochBatches(
        len(images),
        config.batch_size if training else config.eval_batch_size,
        seed=seed,
        shuffle=training,
    )
    data = TransformedImages(
        images, _transform(spec, config, augment=augment), channels=spec.channels, seed=seed
    )
    # timm's create_loader shuffles with the global generator, which no run could resume in mid-epoch.
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=config.workers,
        worker_init_fn=_leave_process_group if config.workers else None,
        generator=torch.Generator(),  # else each iteration would draw from the global one
    )


@contextlib.contextmanager
def random_numbers(*seed: int) -> Iterator[None]:
    """Seeds the global generators that timm's transforms and mixup draw from, and restores them after.

    A transform takes no generator of its own: it draws from `random`, numpy's and torch's global one.
    """
    first, second = np.random.SeedSequence(seed).generate_state(2, np.uint64).tolist()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # of the global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(first)
        random.seed(second)
        np.random.seed(second % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _transform(spec: InputSpec, config: DataConfig, *, augment: bool) -> Transform:
    """Returns timm's training transform (crop and flip, no colour jitter) or its evaluation transform."""
    transform: Transform = create_transform(
        (spec.channels, spec.height, spec.width),
        is_training=augment,
        scale=config.scale,
        hflip=config.hflip,
        color_jitter=None,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
        crop_mode="center",
    )
    return transform


def _leave_process_group(worker: int) -> None:
    """Keeps Ctrl-C in a terminal, which goes to the whole process group, from ending the loader's workers."""
    os.setpgrp()
