import numpy as np
import pytest
from helpers import CLASSES, SIZE, SPEC, make_images, make_model
from PIL import Image

from wasi_export.datasets import load_labelled
from wasi_export.errors import DataError, NothingToCheckError
from wasi_export.image_set import ImageSet
from wasi_export.runtimes.accuracy import measure_accuracy, predict
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session


@pytest.fixture
def session(tmp_path):
    (tmp_path / "model.onnx").write_bytes(make_model())
    return Session.open(tmp_path / "model.onnx")


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize(("wrong", "top1"), [(0, 1.0), (1, 0.75)])
def test_accuracy_counts_the_images_that_are_right(session, tmp_path, batch_size, wrong, top1):
    images = load_labelled(str(make_images(tmp_path / "data", wrong=wrong)), CLASSES)
    result = measure_accuracy(session, images, Preprocess(SPEC), batch_size=batch_size)
    assert (result.total, result.top1) == (4, top1)


@pytest.mark.parametrize("measure", [measure_accuracy, predict])
@pytest.mark.parametrize(("count", "batches"), [(1, 1), (32, 1), (33, 2), (64, 2)])
def test_at_most_32_images_are_in_memory_at_a_time(session, measure, count, batches):
    images = ImageSet(
        CLASSES, np.zeros(count, np.int64), lambda _: Image.new("RGB", (SIZE, SIZE)), "fingerprint"
    )
    told = []

    def track(items, label, total):
        told.append((label, len(items), total))
        return items

    measure(session, images, Preprocess(SPEC), track=track)
    assert told == [("accuracy", batches, batches)]


def test_an_empty_set_of_images_is_nothing_to_check(session, tmp_path):
    images = load_labelled(str(make_images(tmp_path / "data")), CLASSES).take([])
    with pytest.raises(NothingToCheckError, match="no images"):
        measure_accuracy(session, images, Preprocess(SPEC))


def test_a_file_that_is_no_image_is_named(tmp_path):
    folder = make_images(tmp_path / "data")
    (folder / "dark" / "broken.png").write_bytes(b"not a png")
    with pytest.raises(DataError, match=r"1 of 5 images .* cannot be read: dark/broken\.png"):
        load_labelled(str(folder), CLASSES)
