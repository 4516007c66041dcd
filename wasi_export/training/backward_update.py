"""Parameters that are updated in the backward pass, each block as soon as its gradient is complete.

The gradient of a block is freed before that of the block below is made, so that only one block's gradients
exist at a time. An optimiser's step leaves out parameters without a gradient, so `optimizer.step()` with the
gradients of one block is the step of that block: state, learning rates and checkpoints are those of the
ordinary step. The weights after it are the same as well, unless gradients are clipped: the norm over the
whole model is not known before the last gradient is there, and so each block is clipped by its own.

Source: `register_post_accumulate_grad_hook`, PyTorch tutorial "How to save memory by fusing the optimizer
step into the backward pass".
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError

OPTIMIZERS = (
    "adafactor", "adafactorbv", "adam", "adamax", "adamw", "laprop", "lion", "momentum", "nadamw",
    "nesterov", "rmsprop", "sgd",
)  # fmt: skip
"""timm's optimisers that were seen to step one parameter as if there were no others (tests). LAMB, for one,
takes a norm over all gradients, and Adan counts the calls of `step`."""


@contextmanager
def updates_in_backward(
    model: nn.Module, blocks: Iterable[nn.Module], optimizer: torch.optim.Optimizer, config: TrainConfig
) -> Iterator[None]:
    """Makes every backward pass of the model update its parameters, in place, until the block is left.

    A later `optimizer.step()` updates the parameters of a block that not all got a gradient.

    Args:
        model: what is trained.
        blocks: modules whose parameters are updated together; the others are updated module by module.
        optimizer: of the model.
        config: names the optimiser, and the largest gradient norm of a block.

    Raises:
        ConfigError: the optimiser does not step parameters one by one.
    """
    if config.opt.lower() not in OPTIMIZERS:
        raise ConfigError(
            f"memory.update_in_backward needs an optimizer that takes parameters one by one, got opt = "
            f"{config.opt!r}: choose one of {', '.join(OPTIMIZERS)}"
        )

    def hook(group: list[nn.Parameter]) -> None:
        def update(_: Tensor) -> None:
            if any(parameter.grad is None for parameter in group):
                return
            if config.clip_grad is not None:
                clip_grad_norm_(group, config.clip_grad)
            with _only(group, trained):
                optimizer.step()
            for parameter in group:
                parameter.grad = None

        handles.extend(
            parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]
            for parameter in group
        )

    handles: list[torch.utils.hooks.RemovableHandle] = []
    groups = parameter_blocks(model, blocks)
    trained = [parameter for group in groups for parameter in group]
    for group in groups:
        hook(group)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _only(group: list[nn.Parameter], parameters: list[nn.Parameter]) -> Iterator[None]:
    """Takes the gradients of all parameters but those of a group away, in place, until the block is left."""
    own = set(map(id, group))
    waiting = [(p, p.grad) for p in parameters if p.grad is not None and id(p) not in own]
    for parameter, _ in waiting:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in waiting:
            parameter.grad = grad


def parameter_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> list[list[nn.Parameter]]:
    """Returns the trained parameters of each block, then those of every other module; each one once."""
    seen: set[int] = set()
    groups = []
    owned = [list(block.parameters()) for block in blocks]
    owned += [list(module.parameters(recurse=False)) for module in model.modules()]
    for parameters in owned:
        group = [p for p in parameters if p.requires_grad and id(p) not in seen]
        seen.update(map(id, group))
        if group:
            groups.append(group)
    return groups
