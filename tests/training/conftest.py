"""A transformer small enough to train in a second, on real digits."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from wasi_export.config import Config
from wasi_export.datasets import load_data
from wasi_export.image_set import ImageSet
from wasi_export.training.models import create_model

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "name": "vit_tiny_patch16_224",
        "img_size": 16,
        "in_chans": 1,
        "kwargs": {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 4},
    },
    "data": {"source": "digits", "train_images": 88, "val_images": 40, "batch_size": 16, "hflip": 0.0},
    "subspace": {"rank": 16, "calibration_images": 32},
    "train": {
        "dense": {"epochs": 2, "lr": 1e-3, "warmup_steps": 2, "smoothing": 0.1},
        "subspace": {"epochs": 2, "lr": 1e-3, "warmup_steps": 2},
    },
}

TinyConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def tiny() -> TinyConfig:
    """Returns the tiny configuration with `section.key=value` overrides."""

    def make(*overrides: str) -> Config:
        return Config.from_mapping(TINY, overrides)

    return make


@pytest.fixture(scope="session")
def digits(tiny: TinyConfig) -> tuple[ImageSet, ImageSet]:
    return load_data(tiny().data)


@pytest.fixture
def model(tiny: TinyConfig) -> nn.Module:
    return create_model(tiny().model, 10)
