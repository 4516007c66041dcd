"""How many classes a timm model has as it comes, and what they are called."""

from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg

from wasi_export.config import ModelConfig
from wasi_export.errors import ConfigError
from wasi_export.training.models import read_state, require_known


def own_classes(config: ModelConfig) -> tuple[str, ...]:
    """Returns the classes of the head that the model's weights come with.

    Their number is that of the checkpoint's head, or of timm's configuration of the model. Those of ImageNet
    have the names of its folders (`n01440764`), any others are numbered.

    Raises:
        ConfigError: there is no such model or checkpoint, the weights have no head, or timm tells nothing of
            them.
    """
    require_known(config.name)
    description = get_pretrained_cfg(config.name)
    if description is None:
        raise ConfigError(
            f"timm does not know which classes {config.name} has: train a run of it first, or give the model "
            "the name that it has in timm"
        )
    count = description.num_classes
    if config.checkpoint is not None:
        names = description.classifier or ()
        count = _head_size(config.checkpoint, (names,) if isinstance(names, str) else tuple(names))
    if not count:
        raise ConfigError(
            f"the weights of {config.checkpoint or config.name} have no head, so there is nothing to export: "
            "train a run first, or give a checkpoint with a head"
        )
    subset = infer_imagenet_subset({"num_classes": count})
    return tuple(ImageNetInfo(subset).label_names()) if subset else tuple(map(str, range(count)))


def _head_size(checkpoint: Path, names: tuple[str, ...]) -> int | None:
    """Returns the rows of the first classifier in a checkpoint."""
    state = read_state(checkpoint)
    weights = [state[f"{name}.weight"] for name in names if f"{name}.weight" in state]
    return len(weights[0]) if weights else None
