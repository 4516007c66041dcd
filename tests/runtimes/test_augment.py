import numpy as np
import pytest
from helpers import SPEC
from PIL import Image

from wasi_export.runtimes.augment import SCALE, augmented


@pytest.fixture
def image():
    columns = np.tile(np.arange(64, dtype=np.uint8) * 3, (48, 1))
    return Image.fromarray(np.stack([columns] * 3, axis=2))


def test_the_same_seed_gives_the_same_image_and_another_one_another(image):
    first, again, other = (np.asarray(augmented(image, SPEC, *s)) for s in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_images_have_the_size_of_the_input_whatever_theirs_is(image):
    for size in ((1, 1), (3, 50), (64, 48)):
        assert augmented(image.resize(size), SPEC, 0).size == (SPEC.width, SPEC.height)


def test_about_half_of_the_images_are_mirrored_and_crops_keep_most_of_the_area(image):
    steps = []
    for seed in range(200):
        row = np.asarray(augmented(image, SPEC, seed), np.float64)[0, :, 0]
        steps.append((row[-1] - row[0]) / (3 * 64 * (SPEC.width - 1) / SPEC.width))
    assert 70 < sum(step < 0 for step in steps) < 130
    assert min(map(abs, steps)) > SCALE[0] * 0.75**0.5 * 0.7  # the narrowest crop, less what resampling blurs


def test_no_image_is_mirrored_where_that_is_not_wanted(image):
    rows = [np.asarray(augmented(image, SPEC, seed, hflip=0.0), np.float64)[0, :, 0] for seed in range(50)]
    assert all(row[-1] > row[0] for row in rows)
