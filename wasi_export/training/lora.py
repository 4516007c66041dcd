"""A model whose targeted layers are trained as LoRA for a while: see `subspace/lora.py`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from wasi_export.config import Config, SubspaceConfig
from wasi_export.image_set import ImageSet
from wasi_export.subspace.kinds import Kind
from wasi_export.subspace.lora import add_lora, merge_lora
from wasi_export.subspace.targets import target_layers
from wasi_export.training.data import make_loader, random_numbers
from wasi_export.training.models import head_modules, input_spec


def one_input(config: Config, model: nn.Module, images: ImageSet) -> Tensor:
    """Returns one image (1, C, H, W) as training sees it, to show how the model uses its weights."""
    loader = make_loader(images.take(range(1)), input_spec(model, config), config.data, training=False)
    image, _ = next(iter(loader))
    one: Tensor = image.to(next(model.parameters()).device)
    return one


@contextmanager
def lora_layers(model: nn.Module, config: SubspaceConfig, x: Tensor, *, seed: int) -> Iterator[None]:
    """Within it changes of the targeted layers and the head are trained alone; at the end they are merged.

    Args:
        model: changed in place; after an error the changes are still there.
        config: says which layers, and the rank.
        x: an input.
        seed: of the first values.

    Raises:
        UnsupportedModelError: no layer matches.
    """
    targets = target_layers(model, config, x)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    names = [name for name, kind in targets.items() if isinstance(kind, Kind)]
    with random_numbers(seed):
        add_lora(model, names, config.lora_rank, trained=head_modules(model))
    yield
    merge_lora(model)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
