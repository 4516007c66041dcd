"""A model that runs to be looked at, and is then as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def observed(model: nn.Module, hooks: Iterable[RemovableHandle] = ()) -> Iterator[None]:
    """Puts a model in evaluation mode while the context lasts, and leaves it in its own, without the hooks.

    Args:
        model: changed in place.
        hooks: what registering them gives; of an iterator they are registered here, so that none is left
            where one fails.
    """
    was_training = model.training
    handles: list[RemovableHandle] = []
    try:
        handles.extend(hooks)
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
