import numpy as np
import pytest
from helpers import SPEC
from PIL import Image

from wasi_export.datasets import ImageSet
from wasi_export.runtimes.adapt_data import AdaptData


def images(count, label, name):
    labels = np.full(count, label, np.int64)
    return ImageSet(("old", "new"), labels, lambda i: Image.new("RGB", (8, 8), (5 * i, 0, 0)), name)


def make(replay=None, share=0.5, augment=False, batch_size=4):
    return AdaptData(images(10, 1, "new"), replay, SPEC, batch_size, 3, replay_share=share, augment=augment)


def epoch(data, number, start=0):
    return [(x.tobytes(), tuple(y)) for x, y in data.batches(number, start)]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    data = make()
    assert len(data) == 3
    seen = [x for x, _ in data.batches(0, 0)]
    assert [len(x) for x in seen] == [4, 4, 2]
    assert len({image.tobytes() for x in seen for image in x}) == 10
    assert epoch(data, 0) == epoch(data, 0) != epoch(data, 1)


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_that_is_begun_in_the_middle_goes_on_as_the_whole_one(augment):
    data = make(images(7, 0, "old"), augment=augment)
    assert epoch(data, 2, start=3) == epoch(data, 2)[3:]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 10), (0.8, 40)])
def test_replay_has_its_share_of_an_epoch(share, count):
    labels = np.concatenate([y for _, y in make(images(30, 0, "old"), share).batches(0, 0)])
    assert (labels == 0).sum() == count
    assert (labels == 1).sum() == 10


def test_each_epoch_replays_other_images():
    data = make(images(200, 0, "old"))

    def old(number):
        return {
            x.tobytes()
            for batch, y in data.batches(number, 0)
            for x, label in zip(batch, y, strict=True)
            if not label
        }

    assert old(0) != old(1)
