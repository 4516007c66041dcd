from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wasi_export.config import ModelConfig
from wasi_export.errors import ConfigError
from wasi_export.training.labels import own_classes


def test_imagenet_classes_have_the_names_of_its_folders() -> None:
    classes = own_classes(ModelConfig(name="test_vit"))
    assert (len(classes), classes[0], classes[-1]) == (1000, "n01440764", "n15075141")


def test_the_head_of_a_checkpoint_counts(tmp_path: Path) -> None:
    save_file({"head.weight": torch.zeros(4, 64)}, tmp_path / "weights.safetensors")
    config = ModelConfig(name="test_vit", checkpoint=tmp_path / "weights.safetensors")
    assert own_classes(config) == ("0", "1", "2", "3")


def test_classes_that_timm_does_not_know_are_a_clear_error() -> None:
    with pytest.raises(
        ConfigError, match=r"does not know which classes hf-hub:timm/test_vit.r160_in1k has: tr"
    ):
        own_classes(ModelConfig(name="hf-hub:timm/test_vit.r160_in1k"))
    with pytest.raises(ConfigError, match="no tag 'nonsense' of test_vit: choose one of r160_in1k"):
        own_classes(ModelConfig(name="test_vit.nonsense"))


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_dinov2"])
def test_weights_without_a_head_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"norm.weight": torch.zeros(64)}, path)
    checkpoint = path if name == "test_vit" else None
    with pytest.raises(ConfigError, match=r"the weights of .* have no head"):
        own_classes(ModelConfig(name=name, checkpoint=checkpoint))
