"""Where in a model the operators of its training step come from, so that an error can name the module.

While a step is traced, hooks note the module that runs in every node that is made. An operator of the
gradient belongs to the module whose forward made the node of autograd that it is computed by.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback
from torch.utils._pytree import tree_leaves

_KEY = "custom"  # of what the tracer copies from its current state into a node


@dataclass(frozen=True)
class Place:
    """A module of a model, and whether its gradient is meant."""

    module: str
    backward: bool


def place_of(node: fx.Node) -> Place | None:
    """Returns where a traced node comes from; None if that is no module."""
    place: Place | None = node.meta.get(_KEY, {}).get("place")
    return place


def module_of_error(error: BaseException, model: nn.Module) -> str:
    """Returns the name of the innermost module whose code an error came through; "" if there is none."""
    names = {module: name for name, module in model.named_modules()}
    found, frame = "", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = names.get(owner, found)
        frame = frame.tb_next
    return found


@contextmanager
def noting_places(model: nn.Module, is_lost: Callable[[], bool]) -> Iterator[list[str]]:
    """Notes the place of every node that is traced while the context lasts.

    Gives a list that gets the name of the module in which something is lost for the trace.
    """
    lost: list[str] = []
    seen: set[Any] = set()  # holds the nodes of autograd, as an id alone may come twice
    outer: list[Place | None] = []

    def claim(values: Any, name: str) -> None:
        waiting = [t.grad_fn for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
        while waiting:
            made = waiting.pop()
            if made is not None and made not in seen:
                seen.add(made)
                made.register_prehook(lambda *_: _note(Place(name, backward=True)))
                waiting += [source for source, _ in made.next_functions]

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            last = _current()
            claim(inputs, last.module if last is not None else "")  # the caller made them
            outer.append(last)
            _note(Place(name, backward=False))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            claim(outputs, name)
            _note(outer.pop())
            if not lost and is_lost():
                lost.append(name or type(model).__name__)

        return hook

    with ExitStack() as hooks, fx_traceback.preserve_node_meta():
        for name, module in model.named_modules():
            for handle in (
                module.register_forward_pre_hook(enter(name)),
                # always: a block that is computed again stops in the middle, by an exception
                module.register_forward_hook(leave(name), always_call=True),
            ):
                hooks.callback(handle.remove)
        yield lost


def _current() -> Place | None:
    place: Place | None = fx_traceback.get_current_meta().get(_KEY, {}).get("place")
    return place


def _note(place: Place | None) -> None:
    fx_traceback.get_current_meta()[_KEY] = {"place": place}
