"""From an image to the model's input with Pillow and numpy: timm's evaluation transform, without torch.

Resize so that the image covers floor(size / crop_pct), crop the centre, divide by 255, subtract the mean,
divide by the standard deviation.

Source: timm `transforms_imagenet_eval` with crop mode `center`, and the torchvision transforms it is made of.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wasi_export.errors import DataError
from wasi_export.manifest import InputSpec

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_PIXELS = 2**27
"""Of an image after it was resized: 400 MB. At 224 pixels it has fewer unless its sides are 1 to 2,000."""


@dataclass(frozen=True)
class Preprocess:
    """The way from an image to an input of a model."""

    spec: InputSpec

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Returns the input [C, H, W] for an image of any size and mode.

        Raises:
            DataError: it is so long and narrow that it would not fit in memory.
        """
        image = image.convert(self.mode)
        size = _resized(image.size, self.spec)
        if size[0] * size[1] > MAX_PIXELS:
            raise DataError(
                f"an image of {image.width}×{image.height} pixels would have {size[0]}×{size[1]} before the "
                "crop: it is too long for its width, crop it first"
            )
        if size != image.size:
            image = image.resize(size, RESAMPLING[self.spec.interpolation])
        return self.normalise(_center_crop(image, self.spec))

    @property
    def mode(self) -> str:
        """Pillow's mode of the images that the model sees."""
        return "L" if self.spec.channels == 1 else "RGB"

    def normalise(self, image: Image.Image) -> NDArray[np.float32]:
        """Returns the input [C, H, W] for an image of its size and mode."""
        pixels = np.asarray(image, np.float32) / np.float32(255)
        pixels = pixels.reshape(self.spec.height, self.spec.width, self.spec.channels)
        mean, std = np.array(self.spec.mean, np.float32), np.array(self.spec.std, np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))

    def batch(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Returns the inputs [B, C, H, W] of the images."""
        return np.stack([self(image) for image in images])


def _resized(size: tuple[int, int], spec: InputSpec) -> tuple[int, int]:
    """Returns the (width, height) that an image of (width, height) is resized to.

    The two cases round differently: torchvision truncates the long side, timm rounds both.
    """
    width, height = size
    target_width, target_height = (math.floor(n / spec.crop_pct) for n in (spec.width, spec.height))
    if target_width == target_height:
        short, long = min(size), max(size)
        scaled = int(target_width * long / short)
        return (target_width, scaled) if width <= height else (scaled, target_width)
    ratio = min(height / target_height, width / target_width)
    return round(width / ratio), round(height / ratio)


def _center_crop(image: Image.Image, spec: InputSpec) -> Image.Image:
    left = round((image.width - spec.width) / 2)
    top = round((image.height - spec.height) / 2)
    return image.crop((left, top, left + spec.width, top + spec.height))
