"""Which parameters a step trains, and which keep their values.

factors     `left`, `right` and the bias of every factored layer, and the head
right       `right` of every factored layer, and the head
head        the classifier
blocks:N    the last N blocks, the norm after them and the head
all         every parameter
a*b, …      parameters whose names match a pattern
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from wasi_export.errors import ConfigError
from wasi_export.subspace import subspace_layers


def trainable_names(model: nn.Module, chosen: str) -> list[str]:
    """Returns the names of the parameters that are trained, in the order of the model.

    Args:
        model: a timm model, dense or factored.
        chosen: one of the words above, or name patterns with commas between them.

    Raises:
        ConfigError: nothing is chosen, or the model has no such part.
    """
    names = [name for name, _ in model.named_parameters()]
    head = head_names(model)
    layers = dict(subspace_layers(model))
    if chosen in ("factors", "right") and not layers:
        raise ConfigError(
            f'trainable = "{chosen}" is for factored layers, and the model has none: give "all"'
        )
    if chosen == "all":
        return names
    if chosen == "head":
        wanted = head
    elif chosen == "factors":
        wanted = head | {f"{name}.{part}" for name in layers for part in ("left", "right", "bias")}
    elif chosen == "right":
        wanted = head | {f"{name}.right" for name in layers}
    elif match := re.fullmatch(r"blocks:(\d+)", chosen):
        wanted = head | _last_blocks(model, int(match[1]))
    else:
        patterns = [pattern.strip() for pattern in chosen.split(",")]
        wanted = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    found = [name for name in names if name in wanted]
    if not found:
        raise ConfigError(
            f"trainable = {chosen!r} names no parameter: the model has {', '.join(names[:3])}, …"
        )
    return found


def head_names(model: nn.Module) -> set[str]:
    """Returns the names of the parameters of the classifier; distilled models have two, some models none."""
    if not hasattr(model, "get_classifier"):  # as every timm model has
        return set()
    classifier = model.get_classifier()  # type: ignore[operator]
    return _of_modules(model, classifier if isinstance(classifier, tuple) else (classifier,))


def _last_blocks(model: nn.Module, count: int) -> set[str]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise ConfigError(f'{type(model).__name__} has no list of blocks: give name patterns as "stages.3.*"')
    if not 0 < count <= len(blocks):
        raise ConfigError(f'the model has {len(blocks)} blocks, got "blocks:{count}"')
    parts = [*blocks[len(blocks) - count :]]
    parts += [module for key in ("norm", "fc_norm") if (module := getattr(model, key, None)) is not None]
    return _of_modules(model, parts)


def _of_modules(model: nn.Module, modules: Iterable[nn.Module]) -> set[str]:
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}
