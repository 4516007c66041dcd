"""May the new state be written over the old one?

A runtime writes an output as soon as its operator runs. Where the buffer is that of an input, every other
reader of that input must have run before, in whatever order the runtime chooses: it must be among what the
output is computed from. The operator that writes may itself read the input, element by element, as updates
do. With that, a board holds its parameters and their moments once and not twice.
"""

from collections.abc import Iterable

import onnx

from wasi_export.errors import CheckFailedError

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Identity"})


def check_in_place(model: onnx.ModelProto, states: Iterable[tuple[str, str]]) -> None:
    """Does nothing where every (input, output) of a graph may share a buffer.

    Raises:
        CheckFailedError: something may read an input after its output was written.
    """
    nodes = list(model.graph.node)
    made_by = {output: index for index, node in enumerate(nodes) for output in node.output}
    readers: dict[str, set[int]] = {}
    for index, node in enumerate(nodes):
        for name in _reads(node):
            readers.setdefault(name, set()).add(index)
    before = _sources(nodes, made_by)
    problems = []
    for name, result in states:
        writer = made_by[result]
        late = [i for i in readers.get(name, set()) - {writer} if not before[writer] >> i & 1]
        if late or (writer in readers.get(name, set()) and nodes[writer].op_type not in _ELEMENTWISE):
            last = nodes[(late or [writer])[0]]
            problems.append(f"{name} may be read by {last.op_type} {last.name} after it was written")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckFailedError(f"the training step cannot work in place: {'; '.join(problems[:3])}{more}")


def _sources(nodes: list[onnx.NodeProto], made_by: dict[str, int]) -> list[int]:
    """Returns for every node a number whose bit i is set where node i is computed before it, by need."""
    before: list[int] = []
    for node in nodes:
        bits = 0
        for name in _reads(node):
            if (source := made_by.get(name)) is not None:
                bits |= before[source] | 1 << source
        before.append(bits)
    return before


def _reads(node: onnx.NodeProto) -> set[str]:
    """Returns what a node reads, the body of a loop included."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return set(node.input).union(*(_reads(inner) for body in bodies for inner in body.node))
