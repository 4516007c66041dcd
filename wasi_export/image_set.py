"""Labelled images by index, whatever they are read from."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wasi_export.errors import DataError


@dataclass(frozen=True)
class ImageSet:
    """Images by index, their labels [N] into `classes`, a hash of what they are, and a name for each."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    read: Callable[[int], Image.Image]
    fingerprint: str
    name: Callable[[int], str] = "#{}".format
    unreadable: tuple[str, ...] = ()
    """Names of files that would be among these images, and were left out."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index), int(self.labels[index])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "ImageSet":
        """Returns the images at the indices, in that order."""
        chosen = np.asarray(indices, np.int64)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()[:16]
        return replace(
            self,
            labels=self.labels[chosen],
            read=lambda i: self.read(int(chosen[i])),
            fingerprint=digest,
            name=lambda i: self.name(int(chosen[i])),
        )

    def sample(self, count: int | None, seed: int) -> "ImageSet":
        """Returns `count` images drawn without replacement; all of them, in order, for None."""
        if count is None:
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(order[:count])

    def hold_out(self, share: float, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """Returns the images in two parts drawn at random, the second of this share, neither empty.

        Raises:
            DataError: there are not two images.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = min(max(1, round(share * len(self))), len(self) - 1)
        if held_out < 1:
            raise DataError(f"{len(self)} image cannot be split into training and validation: add images")
        return self.take(order[held_out:]), self.take(order[:held_out])

    def join(self, other: "ImageSet") -> "ImageSet":
        """Returns the images of both, which have the same classes."""
        count, labels = len(self), np.concatenate((self.labels, other.labels))
        digest = hashlib.sha256(f"{self.fingerprint}{other.fingerprint}".encode()).hexdigest()[:16]
        return ImageSet(
            self.classes,
            labels,
            lambda i: self.read(i) if i < count else other.read(i - count),
            digest,
            lambda i: self.name(i) if i < count else other.name(i - count),
            tuple(dict.fromkeys(self.unreadable + other.unreadable)),
        )
