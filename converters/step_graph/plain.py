"""Modules in the form that can be traced, while a step is traced."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def plain_forms(model: nn.Module) -> Iterator[None]:
    """Puts modules of a model into another form with the same outputs, in place, while the context lasts.

    Pools take what is contiguous: for other orders of axes torch writes the strides of the result anew.
    Activations do not write over their input: autograd has no plain form of that on a view. Attention with a
    table of biases looks them up and does not take them from what it kept of the last call (LeViT, TinyViT,
    EfficientFormer keep them in eval mode, and the flag is of the attention alone, not of what is in it).
    """
    changed: list[tuple[nn.Module, str, bool]] = []
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            changed.append((module, "inplace", False))
        if hasattr(module, "attention_bias_cache") and not module.training:
            changed.append((module, "training", True))
    pools = [module for module in model.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    hooks = [pool.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),)) for pool in pools]
    for module, flag, value in changed:
        setattr(module, flag, value)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag, value in changed:
            setattr(module, flag, not value)
