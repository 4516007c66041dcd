"""Answers of two models to the same images: counts, confusions, and the images whose answer changed."""

import base64
import io
from itertools import pairwise

import numpy as np
import pytest
from helpers import CLASSES, SPEC, make_images, make_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wasi_export.datasets import load_labelled
from wasi_export.image_set import ImageSet
from wasi_export.report import Comparison
from wasi_export.runtimes.accuracy import AccuracyResult, Pairs, measure_accuracy
from wasi_export.runtimes.comparison import MAX_IMAGES, MAX_THUMBNAILS, compare_answers, describe_predictions
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session


def image_set(labels: np.ndarray, classes: int) -> ImageSet:
    return ImageSet(
        tuple(map(str, range(classes))), labels, lambda i: Image.new("L", (100, 60), i % 256), "fingerprint"
    )


def results(*answers: list[int], labels: list[int]) -> list[AccuracyResult]:
    return [AccuracyResult(np.array(found), np.array(labels)) for found in answers]


@st.composite
def answers(draw):
    """Draws the number of classes, labels, and the answers of two models, of which some are none (-1)."""
    classes = draw(st.integers(2, 60))
    triples = st.tuples(st.integers(0, classes - 1), *[st.integers(-1, classes - 1)] * 2)
    labels, *found = np.array(draw(st.lists(triples, min_size=1, max_size=60))).T
    return classes, *(AccuracyResult(one, labels) for one in found)


@given(answers())
def test_every_answer_is_counted_once(drawn):
    classes, found, _ = drawn
    counted = describe_predictions("bundle", found, classes)
    answered = int((found.answers >= 0).sum())
    assert (counted.correct, counted.total) == (found.correct, found.total)
    assert sum(confusion.images for confusion in counted.confusions) <= answered - found.correct
    assert all(a.images >= b.images for a, b in pairwise(counted.confusions))
    if classes > 50:
        assert counted.matrix is None
        return
    matrix = np.array(counted.matrix)
    assert matrix.shape == (classes, classes)
    assert (matrix.sum(), np.trace(matrix)) == (answered, found.correct)
    for confusion in counted.confusions:
        assert matrix[confusion.label, confusion.answer] == confusion.images


@given(answers())
def test_pairs_and_changed_images_add_up(drawn):
    classes, before, now = drawn
    pairs, images = Pairs.of(before, now), image_set(before.labels, classes)
    assert pairs.total == len(images)
    assert pairs.both_right + pairs.lost == before.correct
    assert pairs.both_right + pairs.won == now.correct
    assert pairs.drop == pytest.approx(before.top1 - now.top1)
    found = compare_answers(images, before, now, confidence=0.95)
    assert found.changed == len(found.images) >= pairs.lost + pairs.won
    right = [(changed.baseline == changed.label, changed.bundle == changed.label) for changed in found.images]
    assert right == sorted(right, reverse=True)  # lost, won, both wrong
    assert (right.count((True, False)), right.count((False, True))) == (pairs.lost, pairs.won)
    assert Comparison.model_validate_json(found.model_dump_json()) == found


def test_a_report_of_many_changes_stays_small():
    labels = np.zeros(3000, np.int64)
    images = image_set(labels, 2)
    before, now = (AccuracyResult(np.full(3000, answer), labels) for answer in (0, 1))
    found = compare_answers(images, before, now, confidence=0.95)
    assert (found.changed, found.lost, len(found.images)) == (3000, 3000, MAX_IMAGES)
    thumbnails = [changed.thumbnail for changed in found.images if changed.thumbnail]
    assert len(thumbnails) == MAX_THUMBNAILS
    assert len(found.model_dump_json()) < 100_000
    with Image.open(io.BytesIO(base64.b64decode(thumbnails[0].split(",")[1]))) as thumbnail:
        assert thumbnail.size == (48, 29)


def test_an_image_has_the_name_of_its_file_through_every_choice(tmp_path):
    images = load_labelled(str(make_images(tmp_path / "data")), CLASSES)
    names = [images.name(index) for index in range(len(images))]
    assert names == sorted(
        str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*.png")
    )
    assert images.take([2, 0]).name(0) == names[2]
    assert images.take([1]).join(images).name(2) == names[1]
    assert image_set(np.zeros(3, np.int64), 2).take([2]).name(0) == "#2"


def test_an_output_that_is_not_a_number_is_no_answer(tmp_path):
    images = load_labelled(str(make_images(tmp_path / "data")), CLASSES)
    (tmp_path / "model.onnx").write_bytes(make_model())
    session = Session.open(tmp_path / "model.onnx")
    nothing = Preprocess(SPEC.model_copy(update={"mean": (float("nan"),) * 3}))
    found = measure_accuracy(session, images, nothing)
    assert (found.answers.tolist(), found.correct) == ([-1] * len(images), 0)
    counted = describe_predictions("bundle", found, len(CLASSES))
    assert (counted.matrix, counted.confusions) == (((0, 0), (0, 0)), ())
