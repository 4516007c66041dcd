"""A graph that takes pixels gives what the graph gives for normalised images."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch

from wasi_export.converters.inference import export_inference
from wasi_export.converters.simplify import fold_normalization
from wasi_export.errors import UnsupportedModelError
from wasi_export.manifest import InputSpec

SPEC = InputSpec(height=32, width=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 1, "num_heads": 3}


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    (y,) = ort.InferenceSession(model.SerializeToString()).run(None, {"images": images})
    return np.asarray(y)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("vit_tiny_patch16_224", {**VIT, "pre_norm": True}),  # no bias in the convolution
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (1, 1)}),
    ],
    ids=["vit", "no bias", "swin"],
)  # fmt: skip
def test_pixels_in_are_as_normalised_images_in(name, arguments):
    torch.manual_seed(0)
    graph = export_inference(timm.create_model(name, num_classes=5, **arguments), SPEC, opset=23)
    pixels = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    mean, std = (np.array(value, np.float32).reshape(3, 1, 1) for value in (SPEC.mean, SPEC.std))
    expected = run(graph, (pixels - mean) / std)
    folded = fold_normalization(graph, SPEC)
    onnx.checker.check_model(folded, full_check=True)
    assert [node.op_type for node in folded.graph.node] == [node.op_type for node in graph.graph.node]
    np.testing.assert_allclose(run(folded, pixels), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert not np.allclose(run(folded, (pixels - mean) / std), expected, rtol=1e-2)


def test_a_convolution_with_padding_is_refused():
    graph = export_inference(
        timm.create_model("efficientformer_l1", num_classes=5),
        SPEC.model_copy(update={"height": 224, "width": 224}),
        opset=23,
    )
    with pytest.raises(UnsupportedModelError, match="go into Conv with padding: leave out"):
        fold_normalization(graph, SPEC)
