"""The inference graph with trained parameters as inputs, and back: equal to an export with those values."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from model_families import FAMILIES, UNFACTORED, factor, make_model, spec_for
from torch import nn

from wasi_export.converters.inference import reference_outputs, write_source
from wasi_export.converters.merge import frozen_tensors, with_inputs, with_values
from wasi_export.errors import IntegrityError, UnsupportedModelError
from wasi_export.manifest import InputSpec
from wasi_export.subspace.inject import fold_layers, subspace_layers

Tensors = dict[str, np.ndarray]


def tensors_of(model: nn.Module) -> Tensors:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def run(graph: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))[0]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def made(family: str, *, fold: bool) -> tuple[nn.Module, InputSpec, int, Tensors]:
    """Returns a model whose every second factored layer is folded, and the tensors that it had before."""
    name, arguments, opset = FAMILIES[family]
    model = make_model(name, arguments)
    if family not in UNFACTORED:
        factor(model)
    tensors = tensors_of(model)
    if fold:
        fold_layers(model, [name for name, _ in subspace_layers(model)][::2])
    return model, spec_for(arguments.get("img_size", 64)), opset, tensors


def images_of(spec: InputSpec) -> np.ndarray:
    shape = (3, spec.channels, spec.height, spec.width)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "windows at opset 18"])
def test_a_graph_with_new_values_is_that_of_the_model_with_new_values(family: str, fold: bool) -> None:
    if fold and family in UNFACTORED:
        pytest.skip("there is nothing to fold")
    model, spec, opset, tensors = made(family, fold=fold)
    names = [name for name in tensors if tensors[name].dtype == np.float32 and "running" not in name]
    trained = {name: tensors[name] for name in names}
    evaluate = with_inputs(write_source(model, spec, opset=opset), trained, tensors, "m")
    images = images_of(spec)
    given: Mapping[str, Any] = {spec.name: images}
    expected = reference_outputs(model, images)
    assert relative(run(evaluate, {**given, **trained}), expected) < 1e-5
    assert relative(run(with_values(evaluate, trained), given), expected) < 1e-5

    rng = np.random.default_rng(2)
    new = {
        name: value * rng.uniform(0.8, 1.2, value.shape).astype(np.float32) for name, value in trained.items()
    }
    other, *_ = made(family, fold=False)
    other.load_state_dict({name: torch.from_numpy(value) for name, value in {**tensors, **new}.items()})
    expected = reference_outputs(other, images)
    assert relative(run(evaluate, {**given, **new}), expected) < 1e-5
    merged = with_values(evaluate, new)
    assert relative(run(merged, given), expected) < 1e-5
    assert relative(run(with_values(evaluate, trained), given), expected) > 1e-3  # the values count
    assert [value.name for value in merged.graph.input] == [spec.name]


@pytest.fixture(scope="module")
def evaluated() -> tuple[onnx.ModelProto, Tensors, Tensors]:
    """A graph with `right` of every layer as inputs, those values, and all tensors."""
    model, spec, opset, tensors = made("layer scale, as deit3", fold=False)
    trained = {name: value for name, value in tensors.items() if name.endswith(".right")}
    return with_inputs(write_source(model, spec, opset=opset), trained, tensors, "m"), trained, tensors


def test_what_is_not_trained_is_in_the_file_as_the_checkpoint_has_it(
    evaluated: tuple[onnx.ModelProto, Tensors, Tensors],
) -> None:
    graph, trained, tensors = evaluated
    found = frozen_tensors(graph)
    assert {value.name for value in graph.graph.input} == {"images", *trained}
    assert not found.keys() & trained.keys()
    for name in {name for name in tensors if tensors[name].dtype == np.float32} - trained.keys():
        np.testing.assert_array_equal(found[name], tensors[name])


def test_the_same_values_give_the_same_bytes(evaluated: tuple[onnx.ModelProto, Tensors, Tensors]) -> None:
    graph, trained, _ = evaluated
    files = [with_values(graph, trained).SerializeToString(deterministic=True) for _ in range(2)]
    assert files[0] == files[1]


def test_a_state_of_another_shape_is_refused(evaluated: tuple[onnx.ModelProto, Tensors, Tensors]) -> None:
    graph, trained, _ = evaluated
    name = next(iter(trained))
    with pytest.raises(IntegrityError, match=rf"needs {name} .*the state has \[3\]"):
        with_values(graph, {**trained, name: np.zeros(3, np.float32)})
    with pytest.raises(IntegrityError, match="the state has none"):
        with_values(graph, {})


def test_a_parameter_without_a_place_of_its_own_is_refused() -> None:
    model, spec, opset, tensors = made("vit", fold=False)
    source = write_source(model, spec, opset=opset)
    with pytest.raises(UnsupportedModelError, match="mask_token would be trained"):
        with_inputs(source, {"mask_token": np.zeros(3, np.float32)}, tensors, "m")
