"""docs/browser/preprocess.js gives the inputs that runtimes/preprocess.py gives, to the bit."""

import itertools
import json

import numpy as np
import PIL
import pytest
from PIL import Image

from wasi_export.manifest import InputSpec
from wasi_export.runtimes.preprocess import RESAMPLING, Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPECS = [
    InputSpec(
        channels=channels,
        height=height,
        width=width,
        mean=MEAN[:channels],
        std=STD[:channels],
        interpolation=interpolation,
        crop_pct=crop_pct,
    )
    for channels, (height, width), interpolation, crop_pct in itertools.product(
        (1, 3), ((32, 32), (24, 40), (41, 23)), RESAMPLING, (0.875, 1.0)
    )
]
tall = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason="Pillow resizes tall images along columns first since version 13",
)


@pytest.mark.parametrize(
    "size",
    [(9, 7), (32, 32), (200, 30), pytest.param((31, 57), marks=tall), pytest.param((61, 203), marks=tall)],
    ids=str,
)
def test_inputs_are_those_of_python(node, size):
    width, height = size
    pixels = np.random.default_rng(size).integers(0, 256, (height, width, 4), np.uint8)
    image = {"width": width, "height": height, "data": pixels.ravel().tolist()}
    specs = [spec.model_dump() for spec in SPECS]
    found = node("preprocess.mjs", stdin=json.dumps({"image": image, "specs": specs}))
    for spec, values in zip(SPECS, found, strict=True):
        expected = Preprocess(spec)(Image.fromarray(pixels))
        np.testing.assert_array_equal(np.float32(values), expected.ravel(), err_msg=repr(spec))
