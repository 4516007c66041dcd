"""Simple augmentation with Pillow and numpy: a random crop, and mirror images where the model knows them.

What is drawn for an image follows from (seed, epoch, index) alone, so a resumed training sees the same.

Source: the crop is torchvision's `RandomResizedCrop` with one try, aspect ratio 3/4 to 4/3.
"""

import math

import numpy as np
from PIL import Image

from wasi_export.manifest import InputSpec
from wasi_export.runtimes.preprocess import RESAMPLING

SCALE = (0.8, 1.0)
"""Share of the area that a crop keeps, where nothing else is said: what training has."""
HFLIP = 0.5
RATIO = (3 / 4, 4 / 3)


def augmented(
    image: Image.Image,
    spec: InputSpec,
    *seed: int,
    scale: tuple[float, float] = SCALE,
    hflip: float = HFLIP,
) -> Image.Image:
    """Returns a random part of an image in the size of the input, mirrored with probability `hflip`."""
    draw = np.random.default_rng(seed)
    area = image.width * image.height * draw.uniform(*scale)
    ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    width = min(image.width, max(1, round(math.sqrt(area * ratio))))
    height = min(image.height, max(1, round(math.sqrt(area / ratio))))
    left = int(draw.integers(0, image.width - width + 1))
    top = int(draw.integers(0, image.height - height + 1))
    box = (left, top, left + width, top + height)
    part = image.resize((spec.width, spec.height), RESAMPLING[spec.interpolation], box=box)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < hflip else part
