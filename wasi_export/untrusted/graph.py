"""ONNX files: one file without others, standard operators, and weights that are numbers and as many as said.

onnxruntime and onnx read a file and whatever files it names, with any operator that is registered. Each of
that was used for an attack before: CVE-2022-25882, CVE-2024-27318, CVE-2024-5187, CVE-2024-7776,
CVE-2025-51480, CVE-2026-27489, CVE-2026-34447 are all of external data, which is why none is allowed here.
"""

import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from wasi_export.errors import MalformedError
from wasi_export.untrusted.onnx_messages import OnnxModel
from wasi_export.untrusted.values import check_finite, check_name, check_shape

STANDARD = ("", "ai.onnx")
MAX_BYTES = 2**31 - 1
"""What protobuf takes."""
MAX_NODES = 200_000
MAX_DEPTH = 8
"""Of graphs in the attributes of nodes; a training step has one, of a loop."""
# TensorProto.DataType, of what a bundle has; the fields are those for data that is not raw.
_TYPES: Mapping[int, tuple[type[np.generic], str]] = {
    1: (np.float32, "float_data"),
    2: (np.uint8, "int32_data"),
    3: (np.int8, "int32_data"),
    6: (np.int32, "int32_data"),
    7: (np.int64, "int64_data"),
    9: (np.bool_, "int32_data"),
    10: (np.float16, "int32_data"),
    11: (np.float64, "double_data"),
}
_DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data", "raw_data")


@dataclass(frozen=True)
class GraphFacts:
    """What a file says of itself; an axis is None where it may have any size."""

    ir_version: int
    opset: int
    inputs: Mapping[str, tuple[int | None, ...]]
    outputs: Mapping[str, tuple[int | None, ...]]


def check_graph(path: Path) -> GraphFacts:
    """Looks at everything in an ONNX file that can do harm.

    Raises:
        MalformedError: it is no ONNX, needs another file or other operators, or holds what no weights are.
        OSError: the file cannot be read.
    """
    if not 0 < (size := path.stat().st_size) <= MAX_BYTES:
        raise MalformedError(f"it has {size} bytes, an ONNX file has 1 to {MAX_BYTES}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            with memoryview(data) as view:
                model = OnnxModel.FromString(view)
        except DecodeError as error:
            raise MalformedError(f"it is no ONNX: {error}") from None
    versions = {entry.domain: entry.version for entry in model.opset_import}
    _require_standard(versions)
    if not model.HasField("graph") or (opset := max(versions.values(), default=0)) < 1:
        raise MalformedError("it is no ONNX: it has no graph or no opset")
    for field in ("functions", "training_info"):
        if getattr(model, field):
            raise MalformedError(f"it has {field}, which no model of ours has")
    _check_graph(model.graph, MAX_DEPTH)
    return GraphFacts(model.ir_version, opset, _shapes(model.graph.input), _shapes(model.graph.output))


def _check_graph(graph: Any, depth: int) -> int:
    """Looks at a graph and at those in it; returns the number of nodes."""
    if depth == 0:
        raise MalformedError(f"its graphs are {MAX_DEPTH} deep")
    if graph.sparse_initializer:
        raise MalformedError("it has sparse_initializer, which no model of ours has")
    _require_standard(node.domain for node in graph.node)
    _shapes((*graph.input, *graph.output, *graph.value_info))
    names = [tensor.name for tensor in graph.initializer]
    if len(set(names)) < len(names):
        raise MalformedError("two initializers have one name")
    for tensor in graph.initializer:
        _check_tensor(tensor)
    nodes = _require_few(len(graph.node))
    for node in graph.node:
        for attribute in node.attribute:
            nodes = _require_few(nodes + _check_attribute(attribute, depth))
    return nodes


def _require_few(nodes: int) -> int:
    if nodes > MAX_NODES:
        raise MalformedError(f"it has more than {MAX_NODES} nodes")
    return nodes


def _check_attribute(attribute: Any, depth: int) -> int:
    """Looks at the value of an attribute; returns the number of nodes in it."""
    if attribute.sparse_tensor or attribute.sparse_tensors:
        raise MalformedError(f"{attribute.name!r} is sparse, which no tensor of ours is")
    check_finite(attribute.name, np.array([attribute.f, *attribute.floats], np.float32))
    for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])):
        _check_tensor(tensor)
    graphs = (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))
    return sum(_check_graph(graph, depth - 1) for graph in graphs)


def _check_tensor(tensor: Any) -> None:
    check_name(tensor.name, "tensor")
    if tensor.external_data or tensor.data_location or tensor.segment:
        raise MalformedError(f"the data of {tensor.name!r} are in another file, and no other file is read")
    shape = tuple(tensor.dims)
    check_shape(tensor.name, shape)
    values = _values(tensor)
    if values.size != (expected := math.prod(shape)):
        raise MalformedError(
            f"{tensor.name!r} has {values.size} numbers, its shape {list(shape)} is of {expected}"
        )
    check_finite(tensor.name, values)


def _values(tensor: Any) -> NDArray[np.generic]:
    """Returns the numbers of a tensor, as one axis."""
    if tensor.data_type not in _TYPES:
        raise MalformedError(f"{tensor.name!r} is of type {tensor.data_type}, which no tensor of ours is")
    kind, field = _TYPES[tensor.data_type]
    filled = [name for name in _DATA if getattr(tensor, name)]
    if filled == ["raw_data"]:
        if len(tensor.raw_data) % np.dtype(kind).itemsize:
            raise MalformedError(f"the bytes of {tensor.name!r} are no whole numbers")
        return np.frombuffer(tensor.raw_data, kind)
    if filled not in ([], [field]):
        raise MalformedError(f"the numbers of {tensor.name!r} are in {', '.join(filled)}")
    values = getattr(tensor, field)
    if kind is np.float16:  # as the bits of it
        return np.array(values, np.int64).astype(np.uint16).view(kind)
    return np.array(values).astype(kind)


def _shapes(values: Iterable[Any]) -> dict[str, tuple[int | None, ...]]:
    """Returns the shapes of inputs, outputs and others by name."""
    shapes = {}
    for value in values:
        check_name(value.name, "value")
        axes = value.type.tensor_type.shape.dim
        check_shape(value.name, tuple(axis.dim_value for axis in axes))
        shapes[value.name] = tuple(axis.dim_value or None for axis in axes)
    return shapes


def _require_standard(domains: Iterable[str]) -> None:
    if foreign := sorted(set(domains) - set(STANDARD)):
        raise MalformedError(f"it needs operators outside the standard, of {', '.join(map(repr, foreign))}")
