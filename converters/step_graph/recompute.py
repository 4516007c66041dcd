"""Blocks that are computed again for the backward pass, in the graph itself.

The step is traced with the blocks under torch's checkpoint, so the trace holds their operators twice, the
second time beside the gradient. A runtime must not merge the two, so the step runs without its optimiser
(`runtimes/training_session.py`).

    none    everything that the backward pass needs is kept
    block   only the inputs of blocks are kept
    fine    the same, and within a block that is computed again, attention and MLP each by themselves: less
            memory at its peak, and their products are computed three times
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wasi_export.errors import ConfigError

Recompute = Literal["none", "block", "fine"]


@contextlib.contextmanager
def recomputing(model: nn.Module, how: Recompute) -> Iterator[None]:
    """Puts the blocks of a model under checkpoint, in place, while the context lasts.

    Raises:
        ConfigError: the model has no blocks.
    """
    blocks = blocks_of(model) if how != "none" else []
    forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    try:
        for block in blocks:
            parts = [m for m in block.children() if how == "fine" and any(True for _ in m.parameters())]
            for module in (block, *parts):
                forwards.append((module, module.forward))
                module.forward = _checkpointed(module.forward)
        yield
    finally:
        for module, forward in forwards:
            module.forward = forward


def recomputed_modules(model: nn.Module, how: Recompute) -> set[nn.Module]:
    """Returns what is computed again: the blocks of a model and all that is in them.

    Raises:
        ConfigError: the model has no blocks.
    """
    return {module for block in (blocks_of(model) if how != "none" else ()) for module in block.modules()}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a model: what its innermost lists of modules of one class hold.

    Raises:
        ConfigError: it has none.
    """
    found = [block for modules in _block_lists(model) for block in modules]
    if not found:
        raise ConfigError(f'{type(model).__name__} has no repeated blocks: give recompute = "none"')
    return found


def _block_lists(model: nn.Module) -> list[nn.Sequential | nn.ModuleList]:
    lists = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList) and _alike(m)]
    return [m for m in lists if not any(other is not m and other in set(m.modules()) for other in lists)]


def _alike(modules: nn.Sequential | nn.ModuleList) -> bool:
    """Returns whether modules are of one class that holds others with parameters."""
    kinds = {type(module) for module in modules}
    return len(kinds) == 1 and len(modules) > 1 and any(True for _ in modules[0].children())


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return result

    return run
