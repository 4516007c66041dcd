import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from wasi_export.manifest import InputSpec
from wasi_export.runtimes.preprocess import Preprocess

IMAGE_SIZES = [(9, 7), (32, 32), (31, 57), (640, 37), (101, 333)]  # width, height


def random_image(size: tuple[int, int], mode: str) -> Image.Image:
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def spec(**changes) -> InputSpec:
    values = {"height": 32, "width": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return InputSpec(**(values | changes))


def expected(image: Image.Image, spec: InputSpec) -> np.ndarray:
    transform = create_transform(
        (spec.channels, spec.height, spec.width),
        is_training=False,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
    )
    return transform(image.convert("L" if spec.channels == 1 else "RGB")).numpy()


@pytest.mark.parametrize("size", IMAGE_SIZES, ids=str)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (24, 40), (41, 23)])
def test_preprocess_equals_the_evaluation_transform_of_timm(size, crop_pct, interpolation, height, width):
    given = spec(height=height, width=width, crop_pct=crop_pct, interpolation=interpolation)
    image = random_image(size, "RGB")
    got = Preprocess(given)(image)
    assert got.dtype == np.float32
    assert got.shape == (3, height, width)
    # the same float32 operations in the same order: a difference would be a rounding at most
    np.testing.assert_allclose(got, expected(image, given), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_become_the_channels_of_the_model(mode, channels):
    given = spec(channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)
    image = random_image((40, 33), mode)
    got = Preprocess(given)(image)
    assert got.shape == (channels, 32, 32)
    np.testing.assert_allclose(got, expected(image, given), rtol=0, atol=1e-6)


def test_a_batch_stacks_images_of_different_sizes():
    preprocess = Preprocess(spec())
    images = [random_image(size, "RGB") for size in IMAGE_SIZES]
    batch = preprocess.batch(images)
    assert batch.shape == (len(images), 3, 32, 32)
    np.testing.assert_array_equal(batch[3], preprocess(images[3]))
