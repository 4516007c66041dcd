"""Which layers of a model are to become factors: by name patterns, and by what they are."""

from fnmatch import fnmatchcase

from jaxtyping import Shaped
from torch import Tensor, nn

from wasi_export.config import CLASSIFIERS, SubspaceConfig
from wasi_export.errors import UnsupportedModelError
from wasi_export.subspace.kinds import Kind, Refusal, find_kinds


def target_layers(
    model: nn.Module, config: SubspaceConfig, images: Shaped[Tensor, "batch ..."] | None = None
) -> dict[str, Kind | Refusal]:
    """Returns the layers whose names match `include` and not `exclude`, in model order, and what they are.

    Args:
        model: any module.
        config: name patterns.
        images: a batch of inputs that shows how the model uses its weights; None: see `find_kinds`.

    Raises:
        UnsupportedModelError: none of them can be factored.
    """
    kinds = find_kinds(model, images)
    targets = {name: kind for name, kind in kinds.items() if _is_target(name, config)}
    if not any(isinstance(kind, Kind) for kind in targets.values()):
        refused = next(
            (f": {n} is not, {k.reason}" for n, k in targets.items() if isinstance(k, Refusal)), ""
        )
        raise UnsupportedModelError(
            f"no layer that can be factored matches {', '.join(config.include)}{refused}; the model has "
            f"{', '.join(list(kinds)[:6]) or 'none'}: set subspace.include"
        )
    return targets


def _is_target(name: str, config: SubspaceConfig) -> bool:
    included = [pattern for pattern in config.include if fnmatchcase(name, pattern)]
    if any(fnmatchcase(name, pattern) for pattern in CLASSIFIERS):
        included = [pattern for pattern in included if pattern != "*"]
    return bool(included) and not any(fnmatchcase(name, pattern) for pattern in config.exclude)
