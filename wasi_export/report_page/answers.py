"""What the models answer to the labelled images: confusions, and the images whose answer changed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from wasi_export.report import ChangedImage, Comparison, Predictions, Report
from wasi_export.report_page.inputs import DENSE, OWN
from wasi_export.report_page.quantities import SPACE, percent, points, shorten
from wasi_export.report_page.svg import Chart
from wasi_export.views import class_name

DRAWN_CLASSES, NUMBERED_CLASSES = 30, 12
"""Up to so many classes a matrix is drawn, and has its numbers in it."""
PAIRS, CARDS = 8, 24
"""How many confusions and images are shown at most; the table has all images."""
WIDTH, TOP, CORNER = 480.0, 18.0, 18.0
LETTER, LONGEST = 7.6, 16
LEVELS = 5
"""Shades of a confusion."""


@dataclass(frozen=True)
class Confused:
    """Images of a class that are taken for another, by each model; None: fewer than it tells of."""

    label: str
    answer: str
    images: tuple[int | None, ...]


@dataclass(frozen=True)
class Changed:
    """An image with another answer than before."""

    image: str
    label: str
    dense: str
    own: str
    dense_right: bool
    own_right: bool
    thumbnail: str

    @property
    def file(self) -> str:
        """The end of its path."""
        return self.image.rpartition("/")[2]

    @property
    def kind(self) -> str:
        """What the change is to the accuracy."""
        if self.dense_right == self.own_right:
            return "wrong both times"
        return "won" if self.own_right else "lost"


@dataclass(frozen=True)
class Answers:
    """What is shown of one machine's answers."""

    labels: tuple[str, ...]
    """Of the models, the dense one first."""
    matrices: tuple[str, ...]
    """A drawing for each model; empty: there are too many classes."""
    confused: tuple[Confused, ...]
    images: int
    comparison: Comparison | None
    verdict: str
    """What the comparison says, in words."""
    changed: tuple[Changed, ...]

    @property
    def has_unknown(self) -> bool:
        """Whether a model does not tell how often it confuses two classes."""
        return any(None in pair.images for pair in self.confused)


def answers_of(key: str, report: Report, names: Mapping[str, str]) -> Answers | None:
    """Returns the answers of a report, whose models have these names on the page; None: it has none."""
    models = [found for name in (DENSE, OWN) for found in report.predictions if found.model == name]
    if not models:
        return None
    labels = tuple(names.get(found.model, found.model) for found in models)
    classes = report.classes
    comparison = report.comparison
    return Answers(
        labels=labels,
        matrices=_matrices(key, models, labels, classes),
        confused=tuple(_confused(models, classes)),
        images=models[0].total,
        comparison=comparison,
        verdict="" if comparison is None else _in_words(comparison),
        changed=() if comparison is None else tuple(_changed(image, classes) for image in comparison.images),
    )


def _matrices(
    key: str, models: Sequence[Predictions], labels: Sequence[str], classes: Sequence[str]
) -> tuple[str, ...]:
    """Returns a drawing of the matrix of each model, shaded alike; none where one cannot be drawn."""
    matrices = [found.matrix for found in models if found.matrix is not None]
    whole = [matrix for matrix in matrices if {len(matrix), *map(len, matrix)} == {len(classes)}]
    if len(whole) < len(models) or len(classes) > DRAWN_CLASSES:
        return ()
    most = max((n for m in whole for i, row in enumerate(m) for j, n in enumerate(row) if i != j), default=0)
    return tuple(
        matrix_chart(f"{key}-{index}", label, matrix, classes, most)
        for index, (label, matrix) in enumerate(zip(labels, whole, strict=True))
    )


def matrix_chart(
    key: str, model: str, matrix: Sequence[Sequence[int]], classes: Sequence[str], most: int
) -> str:
    """Returns the drawing of a confusion matrix: a row for each class, a column for each answer.

    Args:
        key: an identifier, of which the page has no other.
        model: whose matrix it is.
        matrix: images by class and answer.
        classes: their names.
        most: the largest confusion of all matrices that are drawn beside one another; it is the darkest.
    """
    words = [shorten(name, LONGEST) for name in classes]
    longest = LETTER * max(map(len, words)) + 8
    margin = CORNER + longest
    side = (WIDTH - margin) / len(classes)
    across = any(len(word) * LETTER > side - 2 for word in words)
    top = TOP + (longest if across else 20)
    right = sum(matrix[index][index] for index in range(len(classes)))
    chart = Chart(
        key, f"Confusion matrix, {model}", f"{right} of {sum(map(sum, matrix))} images right",
        width=WIDTH, height=top + side * len(classes) + 2,
    )  # fmt: skip
    chart.text((margin, TOP - 6), "answer", "tick")
    chart.text((11, top + side * len(classes)), "class", "tick", upwards=True)
    every = math.ceil(14 / side)
    for index, word in enumerate(words):
        middle = (index + 0.5) * side
        if index % every == 0:
            chart.text((margin - 6, top + middle + 4), word, "tick", anchor="end")
            if across:
                chart.text((margin + middle + 4, top - 6), word, "tick", upwards=True)
            else:
                chart.text((margin + middle, top - 6), word, "tick", anchor="middle")
    for row, counts in enumerate(matrix):
        for column, count in enumerate(counts):
            corner = margin + column * side, top + row * side
            hint = f"{classes[row]} taken for {classes[column]}: {count}"
            level = 0 if row == column or count <= 0 else max(1, math.ceil(LEVELS * count / max(most, 1)))
            css = "right" if row == column else f"wrong-{min(level, LEVELS)}"
            chart.bar((corner[0] + 0.5, corner[1] + 0.5), side - 1, side - 1, f"cell {css}", hint)
            if count and len(classes) <= NUMBERED_CLASSES:
                place = corner[0] + side / 2, corner[1] + side / 2 + 4
                chart.text(place, f"{count}", f"count {css}", anchor="middle")
    return chart.markup()


def _confused(models: Sequence[Predictions], classes: Sequence[str]) -> Iterator[Confused]:
    """Yields the most frequent confusions of all models together."""
    counts = [{(c.label, c.answer): c.images for c in found.confusions} for found in models]
    pairs = {pair: max(found.get(pair, 0) for found in counts) for found in counts for pair in found}
    for pair in sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:PAIRS]:
        images = tuple(_count(found, known, pair) for found, known in zip(models, counts, strict=True))
        yield Confused(class_name(pair[0], classes), class_name(pair[1], classes), images)


def _count(found: Predictions, known: Mapping[tuple[int, int], int], pair: tuple[int, int]) -> int | None:
    """Returns how many images a model confuses so, from its matrix or the confusions it tells of."""
    row, column = pair
    if found.matrix is not None and 0 <= row < len(found.matrix) and 0 <= column < len(found.matrix[row]):
        return found.matrix[row][column]
    return known.get(pair)


def _changed(image: ChangedImage, classes: Sequence[str]) -> Changed:
    return Changed(
        image=image.image,
        label=class_name(image.label, classes),
        dense=class_name(image.baseline, classes),
        own=class_name(image.bundle, classes),
        dense_right=image.baseline == image.label,
        own_right=image.bundle == image.label,
        thumbnail=image.thumbnail,
    )


def _in_words(comparison: Comparison) -> str:
    low, high = (points(-bound) for bound in reversed(comparison.interval))
    return (
        f"{points(-comparison.drop)} points, {percent(comparison.confidence, 0)} confidence interval "
        f"{low} to {high}; McNemar's exact test: p{SPACE}={SPACE}{comparison.p_value:.2g}"
    )
