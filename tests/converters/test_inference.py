"""Exports of many model families, run against torch."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from model_families import FAMILIES, TINY, UNFACTORED, factor, make_model, spec_for
from onnx import numpy_helper
from torch import nn

from wasi_export.artifact import Golden
from wasi_export.converters.check import check_factors, graph_facts
from wasi_export.converters.inference import export_inference, reference_outputs
from wasi_export.errors import ConfigError, UnsupportedModelError
from wasi_export.manifest import InputSpec
from wasi_export.ranks import Plan
from wasi_export.runtimes.parity import measure_parity, require_parity
from wasi_export.subspace.inject import subspace_layers


def golden_for(model: nn.Module, spec: InputSpec) -> Golden:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((7, spec.channels, spec.height, spec.width), np.float32)
    return Golden(images, reference_outputs(model, images), np.zeros(7, np.int64))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_gives_what_torch_gives(family: str, tmp_path: Path) -> None:
    name, arguments, opset = FAMILIES[family]
    model = make_model(name, arguments)
    plan = Plan(activation_mode="none", layers=()) if family in UNFACTORED else factor(model)
    spec = spec_for(arguments.get("img_size", 64))
    graph = export_inference(model, spec, opset=opset)
    check_factors(graph, plan)
    assert bool(plan.factored) == (family not in UNFACTORED)
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    require_parity(measure_parity(path, golden_for(model, spec)), 1e-5)


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, onnx.ModelProto]:
    """A factored ViT and its export, to be read only."""
    model = make_model("vit_tiny_patch16_224", {**TINY, "reg_tokens": 3, "init_values": 0.1})
    factor(model)
    return model, export_inference(model, spec_for(32), opset=23)


def test_every_parameter_is_in_the_file_by_its_name_and_as_torch_has_it(
    exported: tuple[nn.Module, onnx.ModelProto],
) -> None:
    model, graph = exported
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    folded = json.loads(next(entry.value for entry in graph.metadata_props if entry.key == "folded"))
    for name, scale in folded.items():
        parameters[name] = (parameters[name].T * parameters[scale]).T
    for scale in set(folded.values()):
        del parameters[scale]
    added = {name for name in parameters if name.endswith(("pos_embed", "cls_token", "reg_token"))}
    assert len(folded) == 8
    assert len(added) == 3
    cut = re.compile(r"(.+)\[(\d*):(\d*)\]")
    found: dict[str, list[str]] = {}
    for name, value in initializers.items():
        if " @ " in name:
            first, second = name.split(" @ ")
            owner, start, _ = cut.fullmatch(second).groups()
            heads = zip(
                np.split(parameters[first], 3, axis=1),
                np.split(parameters[owner][int(start) :], 3),
                strict=True,
            )
            expected = np.concatenate([left @ right for left, right in heads])
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6, err_msg=name)
            found.setdefault(first, [])
        elif match := cut.fullmatch(name):
            owner, start, end = match.groups()
            rows = slice(int(start or 0), int(end) if end else None)
            np.testing.assert_array_equal(value, parameters[owner][rows], err_msg=name)
            found.setdefault(owner, []).append(name)
        elif name in parameters:
            np.testing.assert_array_equal(value, parameters[name], err_msg=name)
            found[name] = [name]
    assert found.keys() == parameters.keys() - added
    assert not {name for name in initializers if name.endswith("gamma")}


def test_a_factor_replaced_by_name_changes_the_output_as_in_torch(
    exported: tuple[nn.Module, onnx.ModelProto], tmp_path: Path
) -> None:
    model, graph = exported
    name, layer = next(iter(subspace_layers(model)))
    updated = onnx.ModelProto()
    updated.CopyFrom(graph)
    tensor = next(t for t in updated.graph.initializer if t.name == f"{name}.right")
    before = layer.right.detach().clone()
    after = before.flip(0)
    tensor.CopyFrom(numpy_helper.from_array(after.numpy(), tensor.name))
    (tmp_path / "updated.onnx").write_bytes(updated.SerializeToString())
    (tmp_path / "old.onnx").write_bytes(graph.SerializeToString())
    with torch.no_grad():
        layer.right.copy_(after)
        golden = golden_for(model, spec_for(32))
        layer.right.copy_(before)
    require_parity(measure_parity(tmp_path / "updated.onnx", golden, batches=(2,)), 1e-5)
    assert measure_parity(tmp_path / "old.onnx", golden, batches=(2,))[0].max_error > 1e-3


def test_the_graph_needs_no_optimiser(exported: tuple[nn.Module, onnx.ModelProto]) -> None:
    """One Gemm a matrix, whole operators, and no Transpose but that of the patches."""
    model, graph = exported
    nodes = graph_facts(graph).nodes
    matrices = sum(2 for _ in subspace_layers(model)) + sum(type(m) is nn.Linear for m in model.modules())
    assert nodes["Gemm"] == matrices + 1  # q of the last block is another one
    assert (nodes["Attention"], nodes["Gelu"], nodes["Transpose"]) == (2, 2, 1)
    assert not {"MatMul", "Mul", "Constant", "Identity", "Cast"} & nodes.keys()
    used = {name for node in graph.graph.node for name in node.input}
    assert {tensor.name for tensor in graph.graph.initializer} <= used


def test_the_batch_is_named_and_nothing_else_is_dynamic(exported: tuple[nn.Module, onnx.ModelProto]) -> None:
    _, graph = exported
    for value, rest in ((graph.graph.input[0], [3, 32, 32]), (graph.graph.output[0], [5])):
        batch, *others = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert [size.dim_value for size in others] == rest
    assert (graph.graph.input[0].name, graph.graph.output[0].name) == ("images", "logits")


def test_two_exports_are_the_same_bytes_and_name_no_path(exported: tuple[nn.Module, onnx.ModelProto]) -> None:
    model, graph = exported
    content = graph.SerializeToString(deterministic=True)
    again = export_inference(model, spec_for(32), opset=23).SerializeToString(deterministic=True)
    assert again == content
    assert graph.producer_name == "wasi-export"
    for trace in (b"site-packages", b".py", b"timm.", b"pkg."):
        assert trace not in content


def test_windows_are_one_operator_and_nothing_is_copied_or_asked_of_the_runtime() -> None:
    arguments = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}
    model = make_model("swin_tiny_patch4_window7_224", arguments)
    graph = export_inference(model, spec_for(32), opset=23)
    counts = Counter(node.op_type for node in graph.graph.node)
    assert counts["Attention"] == 4
    assert {"Softmax", "MatMul", "Pad", "Mod"}.isdisjoint(counts)
    # The one size that is not known: how many images the mask of the shifted windows is for.
    assert counts["Shape"] == 1
    masks = [tensor for tensor in graph.graph.initializer if tensor.dims[2:] == [1, 16, 16]]
    assert [numpy_helper.to_array(mask).min() for mask in masks] == [-1000]


@pytest.mark.parametrize("opset", [11, 16, 26])
def test_an_opset_out_of_range_is_refused(opset: int) -> None:
    with pytest.raises(ConfigError, match=f"opset must be 17 to 25, got {opset}"):
        export_inference(nn.Linear(2, 2), spec_for(8), opset=opset)


class Branching(nn.Module):
    """Its control flow depends on the pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Features(nn.Module):
    """Not a classifier."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Untranslatable(nn.Module):
    """torch.export takes it; there is no ONNX for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x).mean((2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Branching(), r"torch\.export cannot take Branching with input \[2, 3, 8, 8\]: "),
        (
            Features(),
            r"Features gives an output of 4 axes; a classifier gives \[batch, classes\]",
        ),
        (Untranslatable(), r"torch\.onnx cannot write the model with opset 23: .*bessel_j0"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_in_one_line(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        export_inference(model, spec_for(8), opset=23)
    assert re.search(message, str(raised.value))
    assert "\n" not in str(raised.value)
