"""The error for operators that cannot be written: which, where they are from, what can still be trained.

An operator of the forward pass is needed whatever is trained. One of a gradient is not, where only modules
are trained that run after the one it belongs to.
"""

from collections.abc import Sequence
from itertools import takewhile

from torch import fx

from wasi_export.converters.step_graph.places import place_of
from wasi_export.errors import UnsupportedModelError


class UncoveredOperatorError(UnsupportedModelError):
    """Operators that have no form in a training graph."""

    def __init__(self, nodes: Sequence[fx.Node], reason: str = "") -> None:
        """Makes the error for nodes of one trace.

        Args:
            nodes: that cannot be written.
            reason: why not, where there is a form for other uses of the operator.
        """
        self.operators = tuple(dict.fromkeys(str(node.target) for node in nodes))
        found = list(dict.fromkeys(_where(node) for node in nodes))
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        which = f": {reason}" if reason else ", which has no form in a training graph"
        super().__init__(f"{'; '.join(found[:3])}{more}{which}: {_advice(nodes)}")


def _where(node: fx.Node) -> str:
    place = place_of(node)
    if place is None:
        return f"the training step needs {node.target}"
    module = place.module or "the model itself"
    return (
        f"the gradient of {module} needs {node.target}" if place.backward else f"{module} uses {node.target}"
    )


def _advice(nodes: Sequence[fx.Node]) -> str:
    places = [place_of(node) for node in nodes]
    known = [place for place in places if place is not None and place.backward]
    if len(known) < len(places):
        return "it is of the forward pass, so no choice of trainable parameters avoids it; change the model"
    cut = trainable_after(nodes[0].graph, [place.module for place in known])
    if cut is None:
        return "no parameters come after it that could be trained without it; change the model"
    return f"train only what comes after it, which needs no gradient of it: --trainable {cut}"


def trainable_after(graph: fx.Graph, modules: Sequence[str]) -> str | None:
    """Returns a choice (see `trainable.py`) of parameters that run after modules; None if there are none."""
    first = takewhile(lambda place: place is None or not place.backward, map(place_of, graph.nodes))
    ran = [place.module for place in first if place is not None]  # what is computed again comes later
    inside = [at for at, name in enumerate(ran) if any(_within(name, module) for module in modules)]
    last = max(inside, default=len(ran))
    held = {prefix for name in ran[: last + 1] for prefix in _prefixes(name)}
    later = list(dict.fromkeys(name for name in ran[last + 1 :] if name))
    whole = {name.split(".")[1] for name in later if name.startswith("blocks.")}
    whole = {index for index in whole if f"blocks.{index}" not in held}
    if whole:
        return f"blocks:{len(whole)}"
    free = [next((p for p in _prefixes(name) if p not in held), None) for name in later]
    patterns = list(dict.fromkeys(f"{name}.*" for name in free if name is not None))
    return ",".join(patterns) or None


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _prefixes(name: str) -> list[str]:
    """Returns "a", "a.b", "a.b.c" for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
