"""What makes the file the same bytes every time, and says who made it."""

import re

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from wasi_export import __version__


class FinishPass(ir.passes.InPlacePass):
    """Names the batch axis and the producer and drops all that is not computation, in place.

    Initializers come in the order in which they are first used. torch notes stack traces (with the paths of
    the machine) and module classes in every node and value, and calls the batch axis something like `s77`.
    """

    def __init__(self, *, name: str) -> None:
        """Makes the pass for a graph that is to have this name."""
        super().__init__()
        self.name = name

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Finishes the model; always counts as a modification."""
        ClearMetadataAndDocStringPass()(model)
        graph = model.graph
        graph.name, graph.doc_string = self.name, None
        model.producer_name, model.producer_version = "wasi-export", __version__
        model.doc_string = None
        model.metadata_props.clear()
        graph.metadata_props.clear()
        batch = graph.inputs[0].shape[0] if graph.inputs[0].shape else None
        for value in (*graph.inputs, *graph.initializers.values(), *_results(graph)):
            value.doc_string = None
            value.metadata_props.clear()
            if value.shape is not None and isinstance(batch, ir.SymbolicDim) and batch.value:
                value.shape = ir.Shape([_renamed(size, batch.value) for size in value.shape])
        _sort_initializers(graph)
        return ir.passes.PassResult(model, modified=True)


def _sort_initializers(graph: ir.Graph) -> None:
    used = {str(value.name): None for node in graph for value in node.inputs if value is not None}
    values = [graph.initializers[name] for name in used if name in graph.initializers]
    graph.initializers.clear()
    for value in values:
        graph.register_initializer(value)


def _results(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]


def _renamed(size: int | ir.SymbolicDim, batch: str) -> int | ir.SymbolicDim:
    """Returns the size with the batch symbol called `batch`; the size may be an expression such as 4*s77."""
    if isinstance(size, int) or size.value is None:
        return size
    return ir.SymbolicDim(re.sub(rf"\b{re.escape(batch)}\b", "batch", size.value))
