"""From a traced function of aten operators to ONNX, operator by operator.

Each aten operator has one function that writes it, in `aten_math.py`, `aten_shape.py`, `aten_nn.py`,
`aten_conv.py` or `aten_pool.py`.
The batch is the only size that is not known: a size is an integer, or the batch times one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from wasi_export.converters.graph_builder import GraphBuilder
from wasi_export.converters.step_graph.coverage import UncoveredOperatorError
from wasi_export.errors import UnsupportedModelError

Written = ir.Value | Sequence[ir.Value | None]
Lower = Callable[..., Written]
"""Writes one operator: takes the lowering, the node, and its arguments as the trace has them."""

DTYPES: Mapping[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}
_NUMPY: Mapping[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.bool: np.bool_,
}
_LOWERS: dict[Any, Lower] = {}


def lowers(*operators: Any) -> Callable[[Lower], Lower]:
    """Makes a function the one that writes these operators."""

    def register(function: Lower) -> Lower:
        for operator in operators:
            assert operator not in _LOWERS, operator
            _LOWERS[operator] = function
        return function

    return register


def functional(operator: Any) -> Any:
    """Returns the operator that does not write in place, of one that does; any other as it is."""
    if not isinstance(operator, torch._ops.OpOverload) or not operator._schema.name.endswith("_"):
        return operator
    packet = getattr(torch.ops.aten, operator._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, operator._overloadname, operator)


def _is_operator(node: fx.Node) -> bool:
    """Returns whether a node computes tensors or fractions; what computes sizes is read where it is used."""
    return node.op == "call_function" and not isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool)


def _memory(node: fx.Node) -> Any:
    """Returns what identifies the memory of the tensor that a node gives; its views have the same."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node


def size_of(node: fx.Node) -> list[int | torch.SymInt]:
    """Returns the shape of what a node gives."""
    return list(node.meta["val"].shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    """Returns the type of the numbers that a node gives."""
    dtype: torch.dtype = getattr(node.meta["val"], "dtype", torch.float32)  # a number has none
    return dtype


class Lowering:
    """Writes the nodes of a trace into the graph of a builder."""

    def __init__(self, builder: GraphBuilder, images: ir.Value) -> None:
        """Starts without nodes; the first axis of `images` is the batch."""
        self.builder = builder
        self.op = builder.op
        self._images = images
        self._batch: ir.Value | None = None
        self._values: dict[fx.Node, Written] = {}

    def run(self, graph: fx.Graph, inputs: Iterable[ir.Value]) -> list[ir.Value]:
        """Returns the outputs of a traced graph for values of its inputs.

        Raises:
            UncoveredOperatorError: operators have no function here.
        """
        missing = [n for n in graph.nodes if _is_operator(n) and functional(n.target) not in _LOWERS]
        if missing:
            raise UncoveredOperatorError(missing)
        given = iter(inputs)
        for node in graph.nodes:
            if node.op == "placeholder":
                self._values[node] = next(given)
            elif node.op == "get_attr":
                tensor = getattr(graph.owning_module, str(node.target))
                self._values[node] = self.builder.constant(tensor.detach().cpu().numpy())
            elif _is_operator(node):
                self._values[node] = self._write(node)
        (output,) = (node for node in graph.nodes if node.op == "output")
        return [self[result] for result in output.args[0]]

    def _write(self, node: fx.Node) -> Written:
        operator = functional(node.target)
        try:
            written = _LOWERS[operator](self, node, *node.args, **node.kwargs)
            if operator is not node.target:
                self._overwrite(node, written)
        except UnsupportedModelError as error:
            raise UncoveredOperatorError([node], str(error)) from error
        return written

    def _overwrite(self, node: fx.Node, written: Written) -> None:
        """Lets what was written in place be the value of the tensor from here on.

        Raises:
            UnsupportedModelError: other tensors are views of the same memory, and read later.
        """
        target = node.args[0]
        assert isinstance(target, fx.Node)
        nodes = list(node.graph.nodes)
        at = nodes.index(node)
        later = set(nodes[at + 1 :])
        for other in nodes[:at]:
            if other is not target and _memory(other) == _memory(target) and later & set(other.users):
                raise UnsupportedModelError(f"{target}, in which it writes, is in the same memory as {other}")
        self._values[target] = written

    def __getitem__(self, node: Any) -> ir.Value:
        """Returns the only value of a node."""
        value = self._values[node]
        assert isinstance(value, ir.Value), node
        return value

    def part(self, node: fx.Node, index: int) -> ir.Value:
        """Returns one of the values of a node."""
        value = self._values[node]
        assert not isinstance(value, ir.Value)
        part = value[index]
        assert part is not None, f"{node} gives no output {index}"
        return part

    def operand(self, argument: Any, like: torch.dtype) -> ir.Value:
        """Returns a value for a node, a size or a number, in the type of what it is combined with."""
        if isinstance(argument, fx.Node) and not isinstance(argument.meta["val"], torch.SymInt):
            value = self[argument]
            found = dtype_of(argument)
            return value if found == like else self.op("Cast", value, to=int(DTYPES[like]))
        if isinstance(argument, fx.Node):
            return self.op("Squeeze", self.op("Cast", self.size(argument), to=int(DTYPES[like])))
        return self.builder.constant(np.array(argument, _NUMPY[like]))

    def size(self, size: int | fx.Node | torch.SymInt) -> ir.Value:
        """Returns a size as a tensor [1] of int64."""
        times = batches(size)
        if times is None:
            assert isinstance(size, int)
            return self.ints(size)
        if self._batch is None:
            shape = self.op("Shape", self._images, start=0, end=1)
            self._batch = shape
        return self._batch if times == 1 else self.op("Mul", self._batch, self.ints(times))

    def shape(self, sizes: Sequence[int | fx.Node | torch.SymInt]) -> ir.Value:
        """Returns sizes as a tensor; constant where at most one of them is not known."""
        unknown = [index for index, size in enumerate(sizes) if batches(size) is not None]
        if len(unknown) <= 1:
            return self.ints(*(-1 if index in unknown else int(size) for index, size in enumerate(sizes)))  # type: ignore[arg-type]
        return self.whole_shape(sizes)

    def whole_shape(self, sizes: Sequence[int | fx.Node | torch.SymInt]) -> ir.Value:
        """Returns sizes as a tensor in which none is left open, as Expand needs it."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(*map(int, sizes))  # type: ignore[arg-type]
        return self.op("Concat", *map(self.size, sizes), axis=0)

    def ints(self, *numbers: int) -> ir.Value:
        """Returns a constant tensor of integers."""
        return self.builder.constant(np.array(numbers, np.int64))

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """Returns a value in another type."""
        return self.op("Cast", value, to=int(DTYPES[dtype]))


def batches(size: int | fx.Node | torch.SymInt) -> int | None:
    """Returns how many times the batch a size is; None for a known one.

    Raises:
        UnsupportedModelError: the size depends on the batch in another way.
    """
    known = size.meta["val"] if isinstance(size, fx.Node) else size
    if isinstance(known, int):
        return None
    expression = known.node.expr
    symbols = list(expression.free_symbols)
    times = expression / symbols[0] if len(symbols) == 1 else None
    if times is None or not times.is_Integer:
        raise UnsupportedModelError(
            f"a size is {str(expression).replace(str(symbols[0]), 'batch')}, not a multiple of the batch"
        )
    return int(times)
