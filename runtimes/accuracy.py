"""Top-1 accuracy of a session on labelled images."""

from dataclasses import dataclass

import numpy as np

from wasi_export.datasets import ImageSet
from wasi_export.errors import NothingToCheckError
from wasi_export.progress import Track, silent
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session


@dataclass(frozen=True)
class AccuracyResult:
    """How many of the images have their label as the largest logit."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Share of the images that are right, in [0, 1]."""
        return self.correct / self.total


def measure_accuracy(
    session: Session,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int = 32,
    track: Track = silent,
) -> AccuracyResult:
    """Returns the accuracy on all the images.

    Raises:
        NothingToCheckError: there are no images.
        DataError: a file is not an image.
        ModelFailedError: the model cannot take the images.
    """
    if len(images) == 0:
        raise NothingToCheckError("the data set has no images, so there is no accuracy: add images")
    starts = range(0, len(images), batch_size)
    correct = 0
    for start in track(starts, "accuracy", len(starts)):
        pairs = [images[index] for index in range(start, min(start + batch_size, len(images)))]
        logits = session.run(preprocess.batch([image for image, _ in pairs]))
        correct += int((logits.argmax(axis=1) == np.array([label for _, label in pairs])).sum())
    return AccuracyResult(correct, len(images))
