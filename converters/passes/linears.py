"""A Linear whose outputs a Split takes apart, itself taken apart."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from wasi_export.converters.passes.values import integers, is_own_parameter, sizes


@dataclass(frozen=True)
class SplitLinear:
    """y = Split(Reshape(Gemm(x, W, b))) of own parameters, which nothing but the Split uses."""

    gemm: ir.Node
    views: tuple[ir.Node, ...]
    """The Reshapes between them, the last one first."""
    split: ir.Node

    @property
    def parameters(self) -> tuple[ir.Value, ...]:
        """W [O, I], and b [O] where there is one."""
        return tuple(value for value in self.gemm.inputs[1:] if value is not None)

    @classmethod
    def before(cls, split: ir.Node) -> "SplitLinear | None":
        """Returns the Linear that a Split takes apart; None where there is no such."""
        views: list[ir.Node] = []
        value = split.inputs[0]
        while value is not None and len(value.uses()) == 1:
            node = value.producer()
            if node is None or node.op_type not in ("Reshape", "Gemm"):
                return None
            if node.op_type == "Gemm":
                own = all(map(is_own_parameter, node.inputs[1:]))
                plain = node.attributes.get_int("transB", 0) == 1
                return cls(node, tuple(views), split) if own and plain else None
            views.append(node)
            value = node.inputs[0]
        return None

    def take(self, index: int) -> list[tuple[str, NDArray[np.float32]]]:
        """Leaves all outputs but one to this Linear, in place; returns the rows of W and b for that one.

        Args:
            index: 0, or the last output, which are the ones whose rows can be left out.
        """
        outputs = list(self.split.outputs)
        width = sizes(outputs[index])[-1]
        rest = [sizes(output)[-1] for i, output in enumerate(outputs) if i != index]
        graph = self.split.graph
        assert graph is not None
        taken = []
        for position, parameter in enumerate(self.parameters, start=1):
            assert parameter.const_value is not None
            array = parameter.const_value.numpy()
            cut = width if index == 0 else sum(rest)
            parts = {f"{parameter.name}[:{cut}]": array[:cut], f"{parameter.name}[{cut}:]": array[cut:]}
            (first, last) = parts.items()
            own, other = (first, last) if index == 0 else (last, first)
            taken.append(own)
            self.gemm.replace_input_with(position, add_parameter(graph, *other))
        for view in self.views:
            target = [*(integers(view.inputs[1]) or [])[:-1], sum(rest)]
            view.replace_input_with(1, add_integers(graph, target))
        for node in (self.gemm, *self.views):
            shape = node.outputs[0].shape
            assert shape is not None
            node.outputs[0].shape = ir.Shape([*shape[:-1], sum(rest)])
        self._leave([output for i, output in enumerate(outputs) if i != index], rest)
        return taken

    def _leave(self, outputs: list[ir.Value], widths: list[int]) -> None:
        """Gives the users of these outputs the ones of a smaller Split, or what it would have split."""
        source, graph = self.split.inputs[0], self.split.graph
        assert source is not None
        assert graph is not None
        if len(outputs) == 1:
            outputs[0].replace_all_uses_with(source)
            return
        axis = {"axis": -1}
        new = ir.node("Split", [source, add_integers(graph, widths)], axis, num_outputs=len(widths))
        graph.insert_before(self.split, new)
        for old, made in zip(outputs, new.outputs, strict=True):
            made.type, made.shape = old.type, old.shape
            old.replace_all_uses_with(made)


def add_parameter(graph: ir.Graph, name: str, array: NDArray[np.floating]) -> ir.Value:
    """Returns a new initializer of a graph."""
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    type_ = ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=type_, const_value=tensor)
    graph.register_initializer(value)
    return value


def add_integers(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    """Returns a new constant, at the start of a graph."""
    node = ir.node("Constant", [], {"value": ir.tensor(numbers, ir.DataType.INT64)})
    graph.insert_before(graph[0], node)
    return node.outputs[0]
