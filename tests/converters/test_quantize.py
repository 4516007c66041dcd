"""Graphs of a small ViT in int8 and in half, against the fp32 graph."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from onnx import numpy_helper

from wasi_export.config import Int8Factors, SubspaceConfig
from wasi_export.converters.inference import export_inference
from wasi_export.converters.quantize import other_factors, quantizable_weights, to_fp16_storage, to_int8
from wasi_export.errors import UnsupportedModelError
from wasi_export.manifest import InputSpec
from wasi_export.subspace.inject import factorize_model

IMAGES = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    """A factored ViT, to be read only."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    config = SubspaceConfig(method="plain", fraction=0.5, activation="none")
    factorize_model(model, [], config, total=0)
    spec = InputSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return export_inference(model, spec, opset=23)


def run(model: onnx.ModelProto, optimise: bool = True) -> np.ndarray:
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (y,) = ort.InferenceSession(model.SerializeToString(), options).run(None, {"images": IMAGES})
    return np.asarray(y)


def error(model: onnx.ModelProto, reference: onnx.ModelProto) -> float:
    expected = run(reference)
    return float(np.linalg.norm(run(model) - expected) / np.linalg.norm(expected))


def operators(model: onnx.ModelProto) -> dict[str, int]:
    return {
        kind: sum(node.op_type == kind for node in model.graph.node)
        for kind in {node.op_type for node in model.graph.node}
    }


def test_all_products_become_int8_and_the_outputs_stay_near(graph: onnx.ModelProto) -> None:
    quantized = to_int8(graph)
    onnx.checker.check_model(quantized, full_check=True)
    assert operators(quantized)["MatMulInteger"] == len(quantizable_weights(graph))
    assert not operators(quantized).keys() & {"Gemm", "MatMul"}
    assert {entry.domain for entry in quantized.opset_import} <= {"", "ai.onnx"}
    assert quantized.ByteSize() < 0.5 * graph.ByteSize()
    assert 0 < error(quantized, graph) < 0.1
    np.testing.assert_allclose(run(quantized), run(quantized, optimise=False), atol=1e-4)


@pytest.mark.parametrize(("factor", "other"), [("left", "right"), ("right", "left")])
def test_one_factor_alone_can_be_int8(graph: onnx.ModelProto, factor: Int8Factors, other: str) -> None:
    kept = other_factors(graph, factor)
    assert kept
    assert all(f".{other}" in name for name in kept)
    quantized = to_int8(graph, kept=kept)
    assert operators(quantized)["MatMulInteger"] == len(quantizable_weights(graph)) - len(kept)
    assert 0 < error(quantized, graph) < 0.1
    assert not other_factors(graph, "both")


def test_products_that_are_kept_stay_fp32(graph: onnx.ModelProto) -> None:
    weights = quantizable_weights(graph)
    some = weights[::2]
    quantized = to_int8(graph, kept=some)
    assert operators(quantized)["MatMulInteger"] == len(weights) - len(some)
    assert error(to_int8(graph, kept=weights), graph) < 1e-5
    assert error(quantized, graph) < error(to_int8(graph), graph)


def test_half_the_file_with_the_names_and_the_outputs(graph: onnx.ModelProto) -> None:
    stored = to_fp16_storage(graph)
    onnx.checker.check_model(stored, full_check=True)
    assert stored.ByteSize() < 0.6 * graph.ByteSize()
    assert {t.name for t in stored.graph.initializer} == {t.name for t in graph.graph.initializer}
    for tensor in stored.graph.initializer:
        original = next(t for t in graph.graph.initializer if t.name == tensor.name)
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            np.testing.assert_allclose(
                numpy_helper.to_array(tensor), numpy_helper.to_array(original), rtol=2**-10, atol=1e-7
            )
    assert 0 < error(stored, graph) < 2e-3
    np.testing.assert_allclose(run(stored), run(stored, optimise=False), atol=1e-5)


def test_a_number_above_the_largest_half_is_refused(graph: onnx.ModelProto) -> None:
    large = onnx.ModelProto()
    large.CopyFrom(graph)
    tensor = next(t for t in large.graph.initializer if t.name == "blocks.0.mlp.fc1.right")
    tensor.CopyFrom(numpy_helper.from_array(1e9 * numpy_helper.to_array(tensor), tensor.name))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp\.fc1\.right has numbers above 65504"):
        to_fp16_storage(large)
