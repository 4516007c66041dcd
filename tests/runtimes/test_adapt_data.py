import numpy as np
import pytest
from helpers import SPEC
from PIL import Image

from wasi_export.image_set import ImageSet
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


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_images_are_mirrored_as_often_as_training_did(hflip):
    left_is_dark = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1)))
    one = ImageSet(("old", "new"), np.ones(40, np.int64), lambda i: left_is_dark, "one")
    data = AdaptData(one, None, SPEC, 40, 3, hflip=hflip)
    x = next(data.batches(0, 0))[0]
    assert ((x[..., -1] < x[..., 0]).all(axis=(1, 2)) == bool(hflip)).all()


def test_crops_are_as_large_as_those_of_training():
    steep = Image.fromarray(np.tile(np.arange(0, 256, 2, dtype=np.uint8), (128, 1)))
    one = ImageSet(("old", "new"), np.ones(40, np.int64), lambda i: steep, "one")
    spread = {}
    for scale in ((0.2, 0.2), (1.0, 1.0)):
        x = next(AdaptData(one, None, SPEC, 40, 3, scale=scale, hflip=0.0).batches(0, 0))[0]
        spread[scale] = (x[..., -1] - x[..., 0]).mean()
    assert spread[0.2, 0.2] / spread[1.0, 1.0] == pytest.approx(0.2**0.5, rel=0.2)  # of width; ratio is drawn
