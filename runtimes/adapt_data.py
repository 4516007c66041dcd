"""The images of a training on the board, epoch by epoch, in an order that follows from the seed.

Images to replay, of what the model knows already, are mixed with the new ones, so that it does not forget:
each epoch draws as many as make up their share.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wasi_export.image_set import ImageSet
from wasi_export.manifest import InputSpec
from wasi_export.runtimes.augment import HFLIP, SCALE, augmented
from wasi_export.runtimes.preprocess import Preprocess


@dataclass(frozen=True)
class AdaptData:
    """Batches of (inputs [B, C, H, W], labels [B])."""

    new: ImageSet
    replay: ImageSet | None
    spec: InputSpec
    batch_size: int
    seed: int
    replay_share: float = 0.5
    augment: bool = True
    scale: tuple[float, float] = SCALE
    hflip: float = HFLIP

    def __len__(self) -> int:
        """Returns the batches of an epoch; the last one may be smaller."""
        return -(-self._count // self.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Yields the batches of an epoch, from one of them on."""
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self._count)
        old = generator.integers(0, len(self.replay), self._old) if self.replay is not None else np.empty(0)
        preprocess = Preprocess(self.spec)
        for batch in range(start, len(self)):
            inputs, labels = [], []
            for place in order[batch * self.batch_size : (batch + 1) * self.batch_size]:
                replayed = self.replay is not None and place >= len(self.new)
                source = self.replay if replayed and self.replay is not None else self.new
                index = int(old[place - len(self.new)]) if replayed else int(place)
                image, label = source[index]
                if self.augment:
                    seed = (self.seed, epoch, int(place))
                    image = image.convert(preprocess.mode)
                    part = augmented(image, self.spec, *seed, scale=self.scale, hflip=self.hflip)
                    inputs.append(preprocess.normalise(part))
                else:
                    inputs.append(preprocess(image))
                labels.append(label)
            yield np.stack(inputs), np.array(labels, np.int64)

    @property
    def _old(self) -> int:
        """Images to replay in an epoch."""
        if self.replay is None:
            return 0
        return round(len(self.new) * self.replay_share / (1 - self.replay_share))

    @property
    def _count(self) -> int:
        return len(self.new) + self._old
