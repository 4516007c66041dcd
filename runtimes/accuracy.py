"""Top-1 accuracy of a session on labelled images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    found = predict(session, images, preprocess, batch_size=batch_size, track=track)
    return AccuracyResult(int((found == images.labels).sum()), len(images))


def predict(
    session: Session,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int = 32,
    track: Track = silent,
) -> NDArray[np.int64]:
    """Returns the index of the largest logit of each image.

    Raises:
        DataError: a file is not an image.
        ModelFailedError: the model cannot take the images.
    """
    starts = range(0, len(images), batch_size)
    found = []
    for start in track(starts, "accuracy", len(starts)):
        batch = [images[index][0] for index in range(start, min(start + batch_size, len(images)))]
        found.append(session.run(preprocess.batch(batch)).argmax(axis=1))
    return np.concatenate(found)
