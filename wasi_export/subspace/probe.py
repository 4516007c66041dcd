"""Which weights a model uses in other ways than by calling the layer they belong to.

Some models read `layer.weight` and never call the layer (BEiT gives its qkv a bias made of parts), some do
both. Neither can be seen in the layer, and a factored layer has no such weight. So the model is run once,
with every torch function watched: a function that gets a layer's weight while the layer is not running is
somebody else's use of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from wasi_export.subspace.observe import observed


@torch.no_grad()
def foreign_uses(model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor) -> dict[str, str]:
    """Returns, for the layers that cannot be replaced by others of their kind, why not.

    The model is run once in evaluation mode and left in the mode it was in.

    Args:
        model: any module.
        layers: modules of it, by name.
        images: (B, C, H, W).
    """
    watch = _WeightWatch(layers)
    hooks = (
        hook
        for name, layer in layers.items()
        for hook in (
            layer.register_forward_pre_hook(watch.enter(name)),
            layer.register_forward_hook(watch.leave(name)),
        )
    )
    images = images.to(next(model.parameters()).device)  # before the watch, which would see it ask
    with observed(model, hooks), watch:
        model(images)
    uncalled = {name: "it is never called" for name in layers if name not in watch.called}
    return uncalled | {
        name: f"its weight is used outside of it, by {use}" for name, use in watch.uses.items()
    }


class _WeightWatch(TorchFunctionMode):
    """Notes the layers that run, and the functions that get the weight of one that does not."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.owners = {id(layer.weight): name for name, layer in layers.items()}
        self.running: set[str] = set()
        self.called: set[str] = set()
        self.uses: dict[str, str] = {}

    def enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.running.add(name)
            self.called.add(name)

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.running.discard(name)

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            owner = self.owners.get(id(tensor))
            if owner is not None and owner not in self.running:
                self.uses.setdefault(owner, resolve_name(func) or func.__name__)
        return func(*args, **(kwargs or {}))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors in arguments, also those in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
