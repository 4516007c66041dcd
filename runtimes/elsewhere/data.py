"""Labelled images on another machine."""

from collections.abc import Callable
from pathlib import Path

from wasi_export.array_images import write_npz
from wasi_export.datasets import NAMED_SOURCES, load_labelled
from wasi_export.image_set import ImageSet
from wasi_export.runtimes.targets.target import Target


def data_on(
    target: Target,
    source: str,
    classes: tuple[str, ...],
    folder: Path,
    *,
    load: Callable[[str, tuple[str, ...]], ImageSet] = load_labelled,
) -> str:
    """Returns where labelled images are on a target; those of a named source are written into a folder."""
    if source not in NAMED_SOURCES:
        return target.send(Path(source))
    path = folder / f"{source}.npz"
    write_npz(load(source, classes), path)
    return target.send(path)
