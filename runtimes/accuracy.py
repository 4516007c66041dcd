"""Top-1 accuracy of a session on labelled images, and of two on the same images."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wasi_export.errors import NothingToCheckError
from wasi_export.image_set import ImageSet
from wasi_export.progress import Track, silent
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session
from wasi_export.runtimes.significance import Interval, drop_interval, mcnemar_p_value


@dataclass(frozen=True)
class AccuracyResult:
    """What a model answers to labelled images, and what is right; both [N], classes by index.

    An answer of -1 is none: an output was not a number.
    """

    answers: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the answer is the label, [N]."""
        return np.equal(self.answers, self.labels)

    @property
    def correct(self) -> int:
        """Number of images whose label is the answer."""
        return int(self.right.sum())

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def top1(self) -> float:
        """Share of the images that are right, in [0, 1]."""
        return self.correct / self.total


@dataclass(frozen=True)
class Pairs:
    """How many of the same images two models get right: both, the first alone, the second alone, neither."""

    both_right: int
    lost: int
    won: int
    both_wrong: int

    @classmethod
    def of(cls, before: AccuracyResult, now: AccuracyResult) -> Self:
        """Returns the counts of two results on the same images."""
        first, second = before.right, now.right
        cells = (first & second, first & ~second, ~first & second, ~first & ~second)
        return cls(*(int(cell.sum()) for cell in cells))

    @property
    def total(self) -> int:
        """Number of images."""
        return self.both_right + self.lost + self.won + self.both_wrong

    @property
    def drop(self) -> float:
        """Top-1 of the first model minus that of the second; of counts: 0.90 - 0.89 in floats is not 0.01."""
        return (self.lost - self.won) / self.total

    @property
    def p_value(self) -> float:
        """McNemar's exact test: how likely chance alone makes such a difference, or a larger one."""
        return mcnemar_p_value(self.lost, self.won)

    def interval(self, confidence: float) -> Interval:
        """Returns the confidence interval of the drop."""
        return drop_interval(self.lost, self.won, self.total, confidence)


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
    answers = predict(session, images, preprocess, batch_size=batch_size, track=track)
    return AccuracyResult(answers, images.labels)


def predict(
    session: Session,
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch_size: int = 32,
    track: Track = silent,
) -> NDArray[np.int64]:
    """Returns the index of the largest logit of each image, [N]; -1 where a logit is not a number.

    Raises:
        DataError: a file is not an image.
        ModelFailedError: the model cannot take the images.
    """
    starts = range(0, len(images), batch_size)
    found = []
    for start in track(starts, "accuracy", len(starts)):
        batch = [images[index][0] for index in range(start, min(start + batch_size, len(images)))]
        logits = session.run(preprocess.batch(batch))
        found.append(answers_of(logits))
    return np.concatenate(found)


def answers_of(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Returns the index of the largest of the logits [N, classes], [N]; -1 where one is not a number."""
    return np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))
