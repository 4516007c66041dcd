"""What reads a few tokens at the end needs only these in the last block.

A class-token head reads token 0. Everything between the tokens' last mixing and the head works on each token
alone, so

    Gather(f(x), tokens) = f(Gather(x, tokens))        f: Linear, norm, activation, residual sum

and of the last attention only the queries of these tokens count: q is chosen, k and v stay whole. Where q, k
and v are one Linear, its first rows become a Linear of their own:

    left[:A]·z[tokens]   and   left[A:]·z              A: width of q

Exact: each token that is left is computed as before. Nothing is rewritten where an operator is unknown, or
where something else reads all tokens.
"""

import onnx_ir as ir

from wasi_export.converters.passes.linears import SplitLinear, add_integers, add_parameter
from wasi_export.converters.passes.token_steps import Layout, Step, step_to
from wasi_export.converters.passes.values import integers, sizes


class TokenSelectionPass(ir.passes.InPlacePass):
    """Moves a choice of tokens before the operators that work on each token alone, in place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites what leads to each Gather of tokens."""
        gathers = [node for node in model.graph if node.op_type == "Gather" and _reads_tokens(node)]
        for node in gathers:
            _Selection(node).apply()
        return ir.passes.PassResult(model, bool(gathers))


def _reads_tokens(node: ir.Node) -> bool:
    """Returns whether a node takes constant tokens of [batch, N, D] that nothing else reads."""
    data, indices = node.inputs
    shape = sizes(data)
    return (
        node.attributes.get_int("axis", 0) == 1
        and len(shape) == 3
        and -1 not in shape[1:]
        and data is not None
        and len(data.uses()) == 1
        and integers(indices) is not None
    )


class _Selection:
    """The rewrite of what leads to one Gather."""

    def __init__(self, gather: ir.Node) -> None:
        data, indices = gather.inputs
        assert data is not None
        assert indices is not None
        assert gather.graph is not None
        self.gather, self.data, self.graph = gather, data, gather.graph
        self.tokens = sizes(data)[1]
        self.indices = [index % self.tokens for index in integers(indices) or []]
        self.scalar = not sizes(indices)
        self.steps: dict[ir.Value, Step] = {}
        self.whole: set[ir.Value] = set()
        self.narrowed: dict[ir.Value, ir.Value] = {}

    def apply(self) -> None:
        """Replaces the Gather by what computes its output from fewer tokens."""
        self._follow(self.data, Layout(1))
        nodes = {step.node for step in self.steps.values()} | {self.gather}
        for value in list(self.steps):
            if any(use.node not in nodes for use in value.uses()):
                self._need(value)
        new = self._narrow(self.data, Layout(1))
        if self.scalar:
            new = self._reshape(new, [-1, *sizes(new)[2:]])
        self.gather.outputs[0].replace_all_uses_with(new, replace_graph_outputs=True)

    def _follow(self, value: ir.Value, layout: Layout) -> None:
        """Notes how the chosen tokens of a value come about, and which values are needed whole."""
        if value in self.steps:
            return
        step = step_to(value, layout, self.tokens)
        if step is None:
            self._need(value)
            return
        self.steps[value] = step
        for index in step.whole:
            self._need(step.node.inputs[index])
        for index, inner in step.chosen.items():
            self._follow(_input(step.node, index), inner)

    def _need(self, value: ir.Value | None) -> None:
        """Notes a value and all that it comes from as needed whole."""
        todo = [value]
        while todo:
            found = todo.pop()
            if found is None or found in self.whole:
                continue
            self.whole.add(found)
            producer = found.producer()
            todo += producer.inputs if producer is not None else ()

    def _narrow(self, value: ir.Value, layout: Layout) -> ir.Value:
        """Returns the chosen tokens of a value."""
        if value not in self.narrowed:
            step = self.steps.get(value)
            if step is None or value in self.whole:
                self.narrowed[value] = self._cut(value, layout)
            else:
                self._repeat(step, value, layout)
        return self.narrowed[value]

    def _cut(self, value: ir.Value, layout: Layout) -> ir.Value:
        """Returns the chosen tokens, taken from all of them."""
        if layout.merged:
            rest = sizes(value)[1:]
            return self._reshape(
                self._cut(self._reshape(value, [-1, self.tokens, *rest]), Layout(1)), [-1, *rest]
            )
        gather = ir.node("Gather", [value, add_integers(self.graph, self.indices)], {"axis": layout.axis})
        self._insert(gather)
        return self._described(gather.outputs[0], value, layout)

    def _repeat(self, step: Step, value: ir.Value, layout: Layout) -> None:
        """Computes a value, and what its node gives besides, from the chosen tokens alone."""
        node = step.node
        if node.op_type == "Reshape":
            rest = sizes(value)[layout.axis + 1 :]
            target = [-1, *rest] if layout.merged else [-1, len(self.indices), *rest]
            self.narrowed[value] = self._reshape(self._narrow(_input(node, 0), step.chosen[0]), target)
            return
        if node.op_type == "Split" and node.inputs[0] in self.whole and not layout.merged:
            own = self._own_linear(node, value)
            if own is not None:
                self.narrowed[value] = own
                return
        chosen = {index: self._narrow(_input(node, index), inner) for index, inner in step.chosen.items()}
        # Only now: what is needed whole may have been replaced meanwhile.
        inputs = [chosen.get(index, source) for index, source in enumerate(node.inputs)]
        new = ir.node(node.op_type, inputs, dict(node.attributes), num_outputs=len(node.outputs))
        self._insert(new)
        for old, made in zip(node.outputs, new.outputs, strict=True):
            self.narrowed[old] = self._described(made, old, layout)

    def _own_linear(self, split: ir.Node, value: ir.Value) -> ir.Value | None:
        """Returns the first part of a Linear's outputs by a Linear of its own; None where there is no such.

        The other parts are left to the rest of the Linear, in place.
        """
        linear = SplitLinear.before(split)
        if linear is None or value is not split.outputs[0]:
            return None
        rows, width = self._narrow(_input(linear.gemm, 0), Layout(0, merged=True)), sizes(value)[-1]
        parameters = [add_parameter(self.graph, *part) for part in linear.take(0)]
        own = ir.node("Gemm", [rows, *parameters], {"transB": 1})
        self._insert(own)
        return self._reshape(own.outputs[0], [-1, len(self.indices), width])

    def _reshape(self, value: ir.Value, target: list[int]) -> ir.Value:
        node = ir.node("Reshape", [value, add_integers(self.graph, target)])
        self._insert(node)
        output = node.outputs[0]
        output.type = self.data.type
        output.shape = ir.Shape([None if size == -1 else size for size in target])
        return output

    def _described(self, made: ir.Value, old: ir.Value, layout: Layout) -> ir.Value:
        """Returns a narrowed value with the type and the shape that it has."""
        made.type = old.type
        if old.shape is not None:
            size = None if layout.merged else len(self.indices)
            made.shape = ir.Shape([size if i == layout.axis else d for i, d in enumerate(old.shape)])
        return made

    def _insert(self, node: ir.Node) -> None:
        self.graph.insert_before(self.gather, node)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
