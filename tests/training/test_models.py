import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from wasi_export.config import Config, ModelConfig
from wasi_export.errors import ConfigError, HostError
from wasi_export.training.models import create_model, head_modules, input_spec, load_checkpoint


def saved(model: nn.Module, path: Path) -> Path:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    return path


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_a_model_from_a_checkpoint_gives_the_same_logits(tiny, model, tmp_path, file):
    path = saved(model, tmp_path / file)
    loaded = create_model(tiny(f"model.checkpoint={path}").model, 10)
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_the_position_embedding_is_resized_to_the_image_size(tiny, model, tmp_path):
    path = saved(model, tmp_path / "weights.safetensors")
    larger = create_model(tiny(f"model.checkpoint={path}", "model.img_size=24").model, 10)
    assert larger.pos_embed.shape == (1, 1 + 36, 64)
    assert torch.equal(larger.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert larger(torch.randn(1, 1, 24, 24)).shape == (1, 10)


def test_colour_filters_are_summed_for_a_grey_model(tiny, tmp_path):
    colour = create_model(tiny("model.in_chans=3").model, 10)
    path = saved(colour, tmp_path / "weights.safetensors")
    grey = create_model(tiny(f"model.checkpoint={path}").model, 10)
    summed = colour.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embed.proj.weight, summed)


def test_a_head_for_other_classes_is_left_as_it_was(tiny, model, tmp_path):
    path = saved(create_model(tiny().model, 7), tmp_path / "weights.safetensors")
    head = model.head.weight.clone()
    load_checkpoint(model, path)
    assert torch.equal(model.head.weight, head)


def test_a_backbone_without_a_head_fits(tiny, model, tmp_path):
    backbone = create_model(tiny().model, 0)
    load_checkpoint(model, saved(backbone, tmp_path / "weights.safetensors"))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, backbone.blocks[1].mlp.fc1.weight)


def test_what_does_not_fit_is_named_with_both_shapes(tiny, model, tmp_path):
    state = model.state_dict()
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(7)
    state["surprise.weight"] = state.pop("norm.weight")
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError) as error:
        load_checkpoint(model, tmp_path / "other.safetensors")
    message = str(error.value)
    assert "blocks.0.mlp.fc1.bias 7 against 256" in message
    assert "1 missing (norm.weight)" in message
    assert "1 unknown to the model (surprise.weight)" in message
    assert "\n" not in message


def test_a_checkpoint_that_does_not_fit_changes_nothing(model, tmp_path):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    del state["norm.weight"]
    save_file(state, tmp_path / "other.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError):
        load_checkpoint(model, tmp_path / "other.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_with_more_than_weights_is_not_opened(model, tmp_path):
    torch.save({"state_dict": model.state_dict(), "callback": print}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="not a file of weights alone, and nothing else is opened"):
        load_checkpoint(model, tmp_path / "weights.pth")


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_a_clear_error(model, tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=file):
        load_checkpoint(model, tmp_path / file)


def test_a_missing_checkpoint_is_a_clear_error(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint .*nowhere\.pth: check model\.checkpoint"):
        create_model(tiny(f"model.checkpoint={tmp_path / 'nowhere.pth'}").model, 10)


def test_an_unknown_model_name_gets_the_nearest_ones(tiny):
    with pytest.raises(
        ConfigError, match=r"no model 'vit_tiny_patch16_223': did you mean vit_tiny_patch16_224"
    ):
        create_model(tiny("model.name=vit_tiny_patch16_223").model, 10)


@pytest.mark.parametrize("size", [16, None])
def test_an_unknown_tag_gets_the_known_ones(size):
    message = r"no tag 'nonsense' of vit_tiny_patch16_224: choose one of augreg_in21k, .*or leave it out"
    with pytest.raises(ConfigError, match=message):
        create_model(ModelConfig(name="vit_tiny_patch16_224.nonsense", img_size=size), 10)


def test_a_tag_without_weights_is_known():
    config = of_family("resnet50_mlp.untrained", 64)
    assert create_model(config.model, 10).num_classes == 10


def test_pretrained_weights_of_another_shape_say_what_to_change(tiny, tmp_path, monkeypatch):
    path = saved(create_model(tiny("model.in_chans=3").model, 10), tmp_path / "weights.safetensors")
    overlay = {"file": str(path), "num_classes": 10}
    make = functools.partial(timm.create_model, pretrained_cfg_overlay=overlay)  # in place of a download
    monkeypatch.setattr(timm, "create_model", make)
    config = tiny("model.in_chans=3", "model.pretrained=true").model
    assert create_model(config, 10).num_classes == 10
    other = tiny("model.in_chans=3", "model.pretrained=true", "model.kwargs.embed_dim=96").model
    with pytest.raises(
        ConfigError, match=r"do not fit .*'embed_dim': 96.*size mismatch.*pretrained = false"
    ) as e:
        create_model(other, 10)
    assert "\n" not in str(e.value)


def test_an_unknown_model_argument_is_named(tiny):
    with pytest.raises(ConfigError, match=r"cannot make vit_tiny_patch16_224 .*'dept'"):
        create_model(tiny("model.kwargs.dept=3").model, 10)


def of_family(name: str, img_size: int) -> Config:
    return Config.from_mapping({"model": {"name": name, "img_size": img_size}})


@pytest.mark.parametrize("name", ["test_convnext", "mobilevit_xxs", "resnet10t"])
def test_a_model_that_takes_any_size_is_described_in_the_size_asked_for(name):
    config = of_family(name, 96)
    model = create_model(config.model, 10).eval()
    spec = input_spec(model, config)
    assert (spec.height, spec.width) == (96, 96)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 10)


def test_an_image_size_that_the_model_ignored_is_refused():
    with pytest.raises(
        ConfigError, match=r"efficientformer_l1 cannot take images of 128×128 .*: set model\.img_size to 224"
    ):
        create_model(of_family("efficientformer_l1", 128).model, 10)


def test_the_size_that_such_a_model_has_is_taken():
    config = of_family("efficientformer_l1", 224)
    assert input_spec(create_model(config.model, 10), config).height == 224


def test_pretrained_and_checkpoint_exclude_one_another(tiny):
    with pytest.raises(ConfigError, match="choose one"):
        create_model(tiny("model.pretrained=true", "model.checkpoint=weights.pth").model, 10)


@pytest.mark.slow
def test_pretrained_weights_without_a_network_say_what_to_do(tmp_path):
    script = (
        "from wasi_export.config import ModelConfig; from wasi_export.training.models import create_model\n"
        "create_model(ModelConfig(name='test_vit', pretrained=True), 10)"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(
        f"{HostError.__module__}.HostError: the pretrained weights"
    )
    assert "model.checkpoint" in done.stderr.splitlines()[-1]


def test_the_input_is_described_as_timm_describes_it(tiny):
    config = tiny("model.in_chans=3")
    spec = input_spec(create_model(config.model, 10), config)
    assert (spec.channels, spec.height, spec.width) == (3, 16, 16)
    assert spec.mean == (0.5, 0.5, 0.5)
    assert (spec.interpolation, spec.crop_pct) == ("bicubic", 0.9)


def test_a_grey_model_takes_the_mean_over_the_colours(tiny):
    config = tiny("data.crop_pct=1.0", "model.name=deit_tiny_patch16_224")
    spec = input_spec(create_model(config.model, 10), config)
    assert spec.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert spec.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))
    assert spec.crop_pct == 1.0


def test_a_distilled_model_has_two_heads(tiny):
    model = create_model(tiny("model.name=deit_tiny_distilled_patch16_224").model, 10)
    assert head_modules(model) == (model.head, model.head_dist)
