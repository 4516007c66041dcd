"""What models answer to labelled images, to look at: confusions, and images whose answer changed."""

import base64
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from wasi_export.image_set import ImageSet
from wasi_export.report import ChangedImage, Comparison, Confusion, Predictions
from wasi_export.runtimes.accuracy import AccuracyResult, Pairs

MATRIX_CLASSES = 50
"""More classes are no matrix that a person reads, and would be most of a report."""
MAX_CONFUSIONS = 50
MAX_IMAGES = 200
MAX_THUMBNAILS, THUMBNAIL_PIXELS = 40, 48
"""Some 50 kB of a report."""


def describe_predictions(model: str, found: AccuracyResult, classes: int) -> Predictions:
    """Returns what a model answers to the images, counted by label and answer."""
    answered = (found.answers >= 0) & (found.answers < classes)
    cells = found.labels[answered] * classes + found.answers[answered]
    kinds, images = np.unique(cells, return_counts=True)
    labels, answers = kinds // classes, kinds % classes
    order = [kind for kind in np.argsort(-images, kind="stable") if labels[kind] != answers[kind]]
    matrix = None
    if classes <= MATRIX_CLASSES:
        counts = np.bincount(cells, minlength=classes * classes).reshape(classes, classes)
        matrix = tuple(map(tuple, counts.tolist()))
    return Predictions(
        model=model,
        correct=found.correct,
        total=found.total,
        matrix=matrix,
        confusions=tuple(
            Confusion(label=labels[kind], answer=answers[kind], images=images[kind])
            for kind in order[:MAX_CONFUSIONS]
        ),
    )


def compare_answers(
    images: ImageSet, baseline: AccuracyResult, bundle: AccuracyResult, *, confidence: float
) -> Comparison:
    """Returns the answers of a bundle beside those of its baseline, on the same images.

    Raises:
        DataError: a file is no longer an image.
    """
    pairs = Pairs.of(baseline, bundle)
    changed = np.flatnonzero(baseline.answers != bundle.answers)
    # Lost, won, both wrong: False comes before True.
    order = changed[np.lexsort((~bundle.right[changed], ~baseline.right[changed]))]
    return Comparison(
        both_right=pairs.both_right,
        lost=pairs.lost,
        won=pairs.won,
        both_wrong=pairs.both_wrong,
        drop=pairs.drop,
        interval=pairs.interval(confidence),
        confidence=confidence,
        p_value=pairs.p_value,
        changed=len(changed),
        images=tuple(_changed_images(images, baseline, bundle, order[:MAX_IMAGES].tolist())),
    )


def _changed_images(
    images: ImageSet, baseline: AccuracyResult, bundle: AccuracyResult, indices: list[int]
) -> Iterator[ChangedImage]:
    for place, index in enumerate(indices):
        yield ChangedImage(
            image=images.name(index),
            label=int(images.labels[index]),
            baseline=int(baseline.answers[index]),
            bundle=int(bundle.answers[index]),
            thumbnail=_thumbnail(images.read(index)) if place < MAX_THUMBNAILS else "",
        )


def _thumbnail(image: Image.Image) -> str:
    """Returns a small JPEG of an image as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    small.save(file := io.BytesIO(), format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
