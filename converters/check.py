"""Is an ONNX file what was promised: factors explicit and by name, no product of them, standard operators?"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from wasi_export.converters.passes.value_projection import PRODUCT
from wasi_export.errors import CheckFailedError, ConfigError, first_line
from wasi_export.ranks import LayerPlan, Plan

# The first onnxruntime that loads a model of this opset, and of this IR version: found by loading a model of
# one node in 1.17 to 1.25. The table of the project: https://onnxruntime.ai/docs/reference/compatibility.html
_FIRST_BY_OPSET = {20: (1, 17), 21: (1, 18), 22: (1, 21), 23: (1, 23), 25: (1, 24)}
_FIRST_BY_IR_VERSION = {9: (1, 17), 10: (1, 18), 11: (1, 23), 13: (1, 24)}

# A folded product differs from left·right by the rounding of one matrix product in fp32, at most some 1e-6 of
# its norm; another matrix of that shape differs by as much as its norm.
_SAME = 1e-3

SHOWN = 5
"""Of what is wrong, as many things are told."""


@dataclass(frozen=True)
class GraphFacts:
    """What a reader of the file needs: versions, and what it is made of."""

    opset: int
    ir_version: int
    min_onnxruntime: str
    nodes: Mapping[str, int]
    """Nodes of the graph by operator, most frequent first."""


def graph_facts(model: onnx.ModelProto) -> GraphFacts:
    """Returns versions and node counts of a model of standard operators."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    first = max(_first(_FIRST_BY_OPSET, opset), _first(_FIRST_BY_IR_VERSION, model.ir_version))
    counts = Counter(node.op_type for node in model.graph.node)
    return GraphFacts(opset, model.ir_version, ".".join(map(str, first)), dict(counts.most_common()))


def newest_opset(runtime: str) -> int:
    """Returns the newest opset that an onnxruntime of this version ("1.18", "1.18.1") loads.

    Raises:
        ConfigError: this is no version, or one too old to have been tried.
    """
    match = re.match(r"(\d+)\.(\d+)", runtime)
    version = tuple(map(int, match.groups())) if match else (0, 0)
    opsets = [opset for opset, first in _FIRST_BY_OPSET.items() if first <= version]
    if not opsets:
        oldest = ".".join(map(str, min(_FIRST_BY_OPSET.values())))
        raise ConfigError(f"target runtime {runtime!r} is not a version from {oldest} on")
    return max(opsets)


def check_factors(model: onnx.ModelProto, plan: Plan) -> None:
    """Does nothing where the model is valid ONNX and holds the plan's layers as explicit factors.

    That is: `<layer>.left` [O, K] and `<layer>.right` [K, I] are initializers, in torch's layout and whole or
    as two parts of their rows, each the weight of a Gemm, or through one Reshape of a 1×1 Conv, and nothing
    else, unless it is part of what `passes/value_projection.py` multiplies; no initializer is their product,
    nor one of its shape that the plan does not know by name; the operators are ONNX's own; all data is in the
    one file.

    Raises:
        CheckFailedError: something is not so; the message has the first things that were found.
    """
    problems = [*_validity(model), *_portability(model)]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    dense = {f"{layer.name}.weight" for layer in plan.layers if layer.rank is None}
    factors = {f"{layer.name}.{side}" for layer in plan.factored for side in ("left", "right")}
    for layer in plan.factored:
        problems += _factor_problems(model, tensors, layer)
        problems += _product_problems(tensors, layer, dense | factors)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckFailedError(f"the exported model is not as planned: {'; '.join(problems[:SHOWN])}{more}")


def _validity(model: onnx.ModelProto) -> Iterator[str]:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield f"it is not valid ONNX ({first_line(error)})"


def _portability(model: onnx.ModelProto) -> Iterator[str]:
    foreign = {entry.domain for entry in model.opset_import} | {node.domain for node in model.graph.node}
    if foreign := foreign - {"", "ai.onnx"}:
        yield f"it needs operators outside the standard ({', '.join(sorted(foreign))})"
    if model.functions:
        yield f"it has {len(model.functions)} functions, which not every runtime takes"
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield f"{tensor.name} is in another file"


def _factor_problems(
    model: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto], layer: LayerPlan
) -> Iterator[str]:
    shapes = {
        f"{layer.name}.left": [layer.out_features, layer.rank],
        f"{layer.name}.right": [layer.rank, layer.in_features],
    }
    inputs = {value.name for value in model.graph.input}
    merged = {name for product in tensors if PRODUCT in product for name in product.split(PRODUCT)}
    for name, shape in shapes.items():
        parts = _parts(tensors, name)
        if not parts:
            if name not in merged:
                yield f"there is no initializer {name}"
            continue
        rows = sum(part.dims[0] for part in parts)
        if f"{name}[{rows}:]" in merged:
            rows = shape[0]
        found = [rows, *parts[0].dims[1:]]
        if found != shape:
            yield f"{name} has shape {found}, the plan says {shape}"
        for part in (part.name for part in parts):
            if part in inputs:
                yield f"{part} is an input of the graph too, so a runtime cannot pack it"
            uses = [node for node in model.graph.node if part in node.input]
            if len(uses) != 1:
                yield f"{part} is used {len(uses)} times, expected once"
            yield from (
                f"{part} is not the weight of a Gemm or of a 1×1 Conv but an input of {u.op_type}"
                for u in uses
                if not (_is_weight(u, part) or _is_filter_view(model, u))
            )


def _parts(tensors: Mapping[str, onnx.TensorProto], name: str) -> list[onnx.TensorProto]:
    """Returns the initializer of a name, or the parts `name[:a]` and `name[a:]` of its rows."""
    if name in tensors:
        return [tensors[name]]
    found = [tensor for key, tensor in tensors.items() if key.startswith(f"{name}[")]
    return sorted(found, key=lambda tensor: not tensor.name.startswith(f"{name}[:"))


def _is_weight(node: onnx.NodeProto, name: str) -> bool:
    transposed = any(attribute.name == "transB" and attribute.i == 1 for attribute in node.attribute)
    return node.op_type == "Gemm" and list(node.input).index(name) == 1 and transposed


def _is_filter_view(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Returns whether a node does nothing but show a matrix to one 1×1 Conv as its filters."""
    if node.op_type != "Reshape":
        return False
    view = node.output[0]
    uses = [user for user in model.graph.node if view in user.input]
    return len(uses) == 1 and _is_1x1_conv(uses[0]) and list(uses[0].input).index(view) == 1


def _is_1x1_conv(node: onnx.NodeProto) -> bool:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    kernel = attributes.get("kernel_shape")
    return node.op_type == "Conv" and kernel is not None and list(kernel.ints) == [1, 1]


def _product_problems(
    tensors: Mapping[str, onnx.TensorProto], layer: LayerPlan, planned: set[str]
) -> Iterator[str]:
    """Yields a line for every initializer that is the dense weight of a factored layer, or may be.

    A factor may have the shape of another layer's dense weight, as in Swin, where widths double.
    """
    shape = [layer.out_features, layer.in_features]
    factors = [_joined(_parts(tensors, f"{layer.name}.{side}")) for side in ("left", "right")]
    for name, tensor in tensors.items():
        if _matrix_shape(tensor) not in (shape, shape[::-1]):
            continue
        value = _array(tensor)
        if value is not None and _is_product(value.reshape(_matrix_shape(tensor)), *factors):
            yield f"{name} is the product of the factors of {layer.name}"
        elif name == f"{layer.name}.weight" or not _is_known(name, planned):
            yield f"{name} has the dense shape {list(tensor.dims)} of {layer.name}, which is factored"


def _is_known(name: str, planned: set[str]) -> bool:
    """Returns whether a name tells what a matrix is: of the plan, a layer's weight, a product of factors."""
    return name.split("[")[0] in planned or name.endswith(".weight") or PRODUCT in name


def _matrix_shape(tensor: onnx.TensorProto) -> list[int]:
    """Returns the shape without the axes of a 1×1 filter."""
    shape = list(tensor.dims)
    return shape[:2] if shape[2:] == [1, 1] else shape


def _joined(parts: list[onnx.TensorProto]) -> NDArray[np.float32] | None:
    """Returns the rows of all parts; None where there are none."""
    arrays = [array for array in map(_array, parts) if array is not None]
    return np.concatenate(arrays) if arrays else None


def _array(tensor: onnx.TensorProto) -> NDArray[np.float32] | None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return numpy_helper.to_array(tensor)


def _is_product(
    value: NDArray[np.float32], left: NDArray[np.float32] | None, right: NDArray[np.float32] | None
) -> bool:
    """Returns whether the value is left·right or its transpose."""
    if left is None or right is None or left.shape[-1] != right.shape[0]:
        return False
    product = left @ right
    candidates = (candidate for candidate in (value, value.T) if candidate.shape == product.shape)
    return any(np.linalg.norm(c - product) <= _SAME * np.linalg.norm(product) for c in candidates)


def _first(table: Mapping[int, tuple[int, int]], version: int) -> tuple[int, int]:
    """Returns the entry of the lowest key that is at least the version; the last one for what is newer."""
    return next((first for known, first in table.items() if version <= known), max(table.values()))
