"""A model of timm with random weights, small enough to try: fewer blocks (all are alike) and fewer pixels."""

from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn

from wasi_export.converters.inference import MAX_FILE_BYTES
from wasi_export.manifest import InputSpec

LARGE = 10_000_000  # parameters
DEPTHS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("2 blocks", {"depth": 2}),
    *(
        (f"{few} block{'s' * (few > 1)} a stage", {name: (few,) * stages})
        for name in ("depths", "stages", "layers")
        for stages in (4, 3, 5)
        for few in (2, 1)
    ),
)
LARGE_IMAGE, SIZES = 256, (224, 256, 196, 192)


def make_model(name: str) -> tuple[nn.Module, InputSpec, str]:
    """Returns a model with random weights, its input, and in what it is smaller than its name says."""
    depth, blocks = _fewer_blocks(name)
    model, size = _on_smaller_images(name, depth)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    pixels = f"{size} px" if size != timm.get_pretrained_cfg(name).input_size[-1] else ""
    spec = InputSpec(height=size, width=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return model, spec, ", ".join(filter(None, (blocks, pixels)))


def sketch(name: str, **arguments: Any) -> nn.Module:
    """Returns a model without data, or with data where it computes while it is made."""
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, **arguments)
    except (RuntimeError, NotImplementedError):
        model = timm.create_model(name, **arguments)
    return model


def count_parameters(model: nn.Module) -> int:
    """Returns the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _fewer_blocks(name: str) -> tuple[dict[str, Any], str]:
    """Returns the arguments that make a large model shallow, none for a small one, and what they do."""
    model = sketch(name)
    parameters, stages = count_parameters(model), getattr(model, "stages", ())
    if parameters > LARGE:
        for words, arguments in DEPTHS:
            if (
                "depth" not in arguments
                and len(stages) > 4
                and [*map(len, arguments.values())] != [len(stages)]
            ):
                continue  # it would be made with too few, and fail when it runs
            try:
                shallow = count_parameters(sketch(name, **arguments))
            except (TypeError, RuntimeError, AssertionError, ValueError, IndexError, KeyError):
                continue  # the model knows no such argument, or has another number of stages
            if shallow < min(parameters, MAX_FILE_BYTES // 4):
                return arguments, words
    return {}, ""


def _on_smaller_images(name: str, depth: dict[str, Any]) -> tuple[nn.Module, int]:
    """Returns a model and the size of its images, which is smaller than its own if that is large."""
    own = int(timm.get_pretrained_cfg(name).input_size[-1])
    for size, arguments in _sizes(own):
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, **depth, **arguments).eval()
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue  # not of this size, as CrossViT, which crops for another branch
        return model, size
    torch.manual_seed(0)
    return timm.create_model(name, **depth).eval(), own


def _sizes(own: int) -> Iterator[tuple[int, dict[str, int]]]:
    """Yields sizes of images and the arguments for them: the model may take any, or be made for one."""
    if own > LARGE_IMAGE:
        yield from ((size, {"img_size": size}) for size in SIZES)
        yield from ((size, {}) for size in SIZES)
