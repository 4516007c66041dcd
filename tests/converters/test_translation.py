"""Convolutions as torch writes them, as one Conv each."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from wasi_export.artifact import Golden
from wasi_export.converters.check import check_factors
from wasi_export.converters.inference import export_inference, reference_outputs
from wasi_export.errors import CheckFailedError
from wasi_export.manifest import InputSpec
from wasi_export.ranks import LayerPlan, Plan
from wasi_export.runtimes.parity import measure_parity, require_parity
from wasi_export.subspace.conv import SubspaceConv1x1

SPEC = InputSpec(height=9, width=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "without bias": {"kernel_size": 1, "bias": False},
    "strided and padded, not square": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    "depthwise": {"kernel_size": 3, "groups": 3},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "padding by name": {"kernel_size": 3, "padding": "same"},
}


class Classifier(nn.Module):
    """A layer on images, and the mean over their pixels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).mean((2, 3))


class SizesForBothAxes(nn.Module):
    """Gives one number for both axes, which torch takes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, stride=2, padding=1)


def require_same_outputs(model: nn.Module, graph: onnx.ModelProto, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    images = np.random.default_rng(0).standard_normal((3, 3, 9, 8), np.float32)
    golden = Golden(images, reference_outputs(model, images), np.zeros(3, np.int64))
    require_parity(measure_parity(path, golden), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_a_convolution_gives_what_torch_gives(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(nn.Conv2d(3, 6, **options))
    graph = export_inference(model, SPEC, opset=23)
    require_same_outputs(model, graph, tmp_path)
    names = {tensor.name for tensor in graph.graph.initializer}
    assert {name for name, _ in model.named_parameters()} <= names
    assert ("layer.bias" in names) == (model.layer.bias is not None)


@pytest.mark.slow
def test_one_size_for_both_axes_is_a_pair(tmp_path: Path) -> None:
    model = Classifier(SizesForBothAxes())
    require_same_outputs(model, export_inference(model, SPEC, opset=18), tmp_path)


@pytest.fixture(scope="module")
def factored() -> tuple[nn.Module, onnx.ModelProto]:
    """A factored 1×1 convolution with batch normalisation after it, and its export, to be read only."""
    torch.manual_seed(0)
    layer = SubspaceConv1x1(3, 6, 2, stride=(2, 2))
    model = Classifier(nn.Sequential(layer, nn.BatchNorm2d(6), nn.GELU()))
    return model, export_inference(model, SPEC, opset=23)


def plan_of(rank: int) -> Plan:
    decision = LayerPlan(
        name="layer.0",
        in_features=3,
        out_features=6,
        rank=rank,
        method="plain",
        energy=None,
        reason="for the test",
    )
    return Plan(activation_mode="none", layers=(decision,))


@pytest.mark.slow
def test_a_factored_convolution_is_two_with_its_factors_explicit(
    factored: tuple[nn.Module, onnx.ModelProto], tmp_path: Path
) -> None:
    model, graph = factored
    check_factors(graph, plan_of(2))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(tensors[name], parameter.detach().numpy())
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("Conv") == 2
    assert "Transpose" not in operators
    require_same_outputs(model, graph, tmp_path)


@pytest.mark.slow
def test_a_factored_convolution_of_another_rank_is_not_as_planned(
    factored: tuple[nn.Module, onnx.ModelProto],
) -> None:
    with pytest.raises(CheckFailedError, match=r"layer\.0\.left has shape \[6, 2\], the plan says \[6, 3\]"):
        check_factors(factored[1], plan_of(3))
