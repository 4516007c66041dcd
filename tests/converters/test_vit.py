"""Every part that is written directly, in small models with random values, against timm's own forward."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm
import torch
from model_families import randomise
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import nn

from wasi_export.converters.graph_builder import UncoveredModuleError
from wasi_export.converters.inference import export_inference
from wasi_export.converters.vit import write_vit
from wasi_export.errors import ConfigError
from wasi_export.manifest import InputSpec

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "layer scale": {"init_values": 0.1},
    "registers, mean of the patches": {"global_pool": "avg", "reg_tokens": 3},
    "mean of all tokens": {"global_pool": "avg", "reg_tokens": 3, "pool_include_prefix": True},
    "largest": {"global_pool": "max"},
    "mean and largest": {"global_pool": "avgmax"},
    "learnt query": {"global_pool": "map", "class_token": False},
    "learnt query without registers": {"global_pool": "map", "reg_tokens": 2},
    "refined patches": {"global_pool": "prr"},
    "features": {"num_classes": 0},
    "positions of patches only": {"no_embed_class": True, "reg_tokens": 2},
    "positions for any size": {"dynamic_img_size": True, "class_token": False, "global_pool": "avg"},
    "no positions": {"pos_embed": "none"},
    "norm before the blocks": {"pre_norm": True, "final_norm": False},
    "normalised q and k": {"qk_norm": True},
    "normalised branches": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False, "norm_layer": RmsNorm},
    "norm after": {"block_fn": ResPostBlock, "global_pool": "avg"},
    "parallel branches": {"block_fn": ParallelThingsBlock, "init_values": 0.1},
    "attention beside mlp": {"block_fn": ParallelScalingBlock, "qkv_bias": False, "qk_norm": True},
    "differences beside mlp": {"block_fn": DiffParallelScalingBlock, "qk_norm": True},
    "differences": {"attn_layer": "diff"},
    "gate before": {"mlp_layer": SwiGLUPacked},
    "gate after": {"mlp_layer": GluMlp},
    "gate apart": {"mlp_layer": SwiGLU},
    "quick gelu": {"act_layer": "quick_gelu"},
    "tanh gelu": {"act_layer": "gelu_tanh"},
    "relu": {"act_layer": "relu"},
}


def make_model(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    """Returns a model whose parameters all show in its output."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, **{**TINY, **arguments}).eval()
    randomise(model)
    return model


def spec_for(model: nn.Module) -> InputSpec:
    height, width = model.patch_embed.img_size
    return InputSpec(height=height, width=width, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def require_same(model: nn.Module, graph: onnx.ModelProto, spec: InputSpec) -> None:
    """Compares the outputs of batches, with the runtime's optimiser and without."""
    onnx.checker.check_model(graph, full_check=True)
    for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        session = ort.InferenceSession(graph.SerializeToString(), options)
        for batch in (1, 2, 7):
            images = torch.randn(batch, 3, spec.height, spec.width)
            with torch.no_grad():
                expected = model(images).numpy()
            (found,) = session.run(None, {spec.name: images.numpy()})
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_gives_what_timm_gives(variant: str, opset: int) -> None:
    model = make_model(**VARIANTS[variant])
    spec = spec_for(model)
    require_same(model, export_inference(model, spec, opset=opset), spec)


@pytest.mark.parametrize("opset", [17, 23])
def test_both_heads_of_a_distilled_model_count(opset: int) -> None:
    model = make_model("deit_tiny_distilled_patch16_224")
    require_same(model, export_inference(model, spec_for(model), opset=opset), spec_for(model))


@pytest.mark.parametrize(("height", "width"), [(30, 24), (40, 61)])
def test_images_of_another_size_are_padded_and_positions_resampled(height: int, width: int) -> None:
    model = make_model(dynamic_img_pad=True, dynamic_img_size=True)
    spec = InputSpec(height=height, width=width, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    require_same(model, export_inference(model, spec, opset=23), spec)


@pytest.mark.slow
def test_another_stem_is_traced_and_the_rest_is_written() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=1, num_classes=5).eval()
    spec = InputSpec(height=64, width=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    graph = export_inference(model, spec, opset=23)
    require_same(model, graph, spec)
    names = {tensor.name for tensor in graph.graph.initializer}
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight[:192]"} <= names
    with pytest.raises(ConfigError, match=r"patch_embed is a HybridEmbed.*: opset 17 is too low for torch"):
        export_inference(model, spec, opset=17)


def test_tokens_are_the_output_without_a_pool() -> None:
    model = make_model(global_pool="", num_classes=0)
    spec = spec_for(model)
    graph = ir.to_proto(write_vit(model, spec, opset=23, output="tokens"))
    session = ort.InferenceSession(graph.SerializeToString())
    images = torch.randn(2, 3, 32, 32)
    (found,) = session.run(["tokens"], {spec.name: images.numpy()})
    np.testing.assert_allclose(found, model(images).detach().numpy(), atol=1e-5)


class OwnBlock(Block):
    """Of which nobody knows what it computes."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "the model is a Linear, which is not written directly"),
        (make_model(block_fn=OwnBlock), "blocks.0 is a OwnBlock, which is not written directly"),
        (make_model(act_layer="mish"), "blocks.0.mlp.act is a Mish, which is not written directly"),
    ],
    ids=["another model", "another block", "another activation"],
)
def test_what_is_not_known_is_named(model: nn.Module, message: str) -> None:
    spec = InputSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(UncoveredModuleError, match=message):
        write_vit(model, spec, opset=23, output="logits")
