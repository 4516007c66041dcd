"""Labelled images, read the same way in training and on the board: Pillow and numpy, no torch.

A source is `digits` (inside scikit-learn), `fashion-mnist` (the four IDX files, as Debian's
`dataset-fashion-mnist` installs them), or a folder:

    folder/<class>/*.jpg                 all images; the validation part is held out by seed
    folder/train/<class>/*.jpg           already split; `val`, `validation` or `test` beside it, or held out

Files of a folder that cannot be read are left out, with a warning; too many of them are an error.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wasi_export.array_images import (
    FASHION_MNIST_ROOT,
    digits,
    download_fashion_mnist,
    fashion_mnist,
    idx_folder,
    npz_images,
)
from wasi_export.config import DataConfig
from wasi_export.errors import DataError, NothingToCheckError, some
from wasi_export.image_files import MAX_UNREADABLE, image_files, read_image, unreadable
from wasi_export.image_set import ImageSet
from wasi_export.progress import Track, silent

_log = logging.getLogger(__name__)

NAMED_SOURCES = ("digits", "fashion-mnist")
VALIDATION_FOLDERS = ("val", "validation", "test")
_NO_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that a terminal obeys, and bytes that are no UTF-8."""


def load_splits(
    source: str,
    *,
    root: Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    max_unreadable: float = MAX_UNREADABLE,
    track: Track = silent,
) -> tuple[ImageSet, ImageSet]:
    """Returns the training and the validation images of a source.

    Raises:
        DataError: the source is unknown or cannot be read, or too many of its images cannot.
        NothingToCheckError: a folder holds no images.
    """
    if source == "fashion-mnist":
        folder = root or FASHION_MNIST_ROOT
        return fashion_mnist(folder, "train"), fashion_mnist(folder, "t10k")
    if source == "digits":
        return digits().hold_out(val_fraction, seed)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(
            f"no data source {source!r}: give `digits`, `fashion-mnist`, or a folder of class folders"
        )
    validation = _validation_folder(folder)
    if (folder / "train").is_dir() and validation:
        train = image_folder(folder / "train", max_unreadable=max_unreadable, track=track)
        return train, image_folder(
            validation, classes=train.classes, max_unreadable=max_unreadable, track=track
        )
    images = image_folder(_undivided(folder), max_unreadable=max_unreadable, track=track)
    return images.hold_out(val_fraction, seed)


def load_data(config: DataConfig, *, track: Track = silent) -> tuple[ImageSet, ImageSet]:
    """Returns the training and the validation images of a configuration.

    The split and the choice of `train_images` and `val_images` do not depend on the seed of the run: runs
    with different seeds are compared on the same images, and none is judged on what another was trained on.

    Raises:
        DataError: the source is unknown or cannot be read.
        HostError: a download that was asked for failed.
        NothingToCheckError: a folder holds no images.
    """
    root = config.root
    if config.download and config.source == "fashion-mnist":
        root = download_fashion_mnist(root or Path("data"))
    train, val = load_splits(
        config.source,
        root=root,
        val_fraction=config.val_fraction,
        max_unreadable=config.max_unreadable,
        track=track,
    )
    return _chosen((train, val), config)


def load_labelled(
    source: str,
    classes: Sequence[str],
    *,
    trained_on: tuple[DataConfig, str] | None = None,
    track: Track = silent,
) -> ImageSet:
    """Returns the images to judge a model with `classes` on: the validation split, a folder or an .npz.

    Of the very folder that it was trained on, wherever that is now, those are taken that were held out.

    Args:
        source: `digits`, `fashion-mnist`, a folder, or an .npz.
        classes: of the model.
        trained_on: how the model's training images were chosen, and their fingerprint.
        track: progress display.

    Raises:
        DataError: the source is unknown, cannot be read, or has other classes.
        NothingToCheckError: a folder holds no images.
    """
    folder, names = Path(source), tuple(classes)
    config = trained_on[0] if trained_on else DataConfig()
    if folder.suffix == ".npz":
        return npz_images(folder, names)
    if source in NAMED_SOURCES or not folder.is_dir():
        root = _downloaded(config) if source == config.source else None
        return _splits_of_model(source, names, root)[1]
    part = _validation_folder(folder)
    images = image_folder(
        part or _undivided(folder), classes=names, max_unreadable=config.max_unreadable, track=track
    )
    if part is None and trained_on is not None and len(images) > 1:
        train, val = _chosen(images.hold_out(config.val_fraction), config)
        if train.fingerprint == trained_on[1]:
            _log.warning(
                f"{folder} is what the model was trained on: it is judged on the {len(val)} images that were "
                "held out"
            )
            return val
    return images


def load_calibration(source: str, *, root: Path | None = None, track: Track = silent) -> ImageSet:
    """Returns images to calibrate on: the training images of a named source, or all images below a folder.

    The images of a folder have no classes, and labels of -1.

    Raises:
        DataError: the source is unknown or cannot be read.
        NothingToCheckError: a folder holds no images.
    """
    folder = Path(source)
    if source in NAMED_SOURCES or not folder.is_dir():
        return load_splits(source, root=root)[0]
    files = image_files(folder)
    left_out = unreadable(folder, files, track=track)
    files = [path for path in files if path.relative_to(folder).as_posix() not in left_out]
    if not files:
        raise NothingToCheckError(f"no images in {folder}: calibration needs some, .jpg or .png")
    names = "".join(f"{path.relative_to(folder)}\0{path.stat().st_size}\n" for path in files)
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    labels = np.full(len(files), -1, np.int64)
    return ImageSet((), labels, lambda i: read_image(files[i]), digest, unreadable=tuple(left_out))


def image_folder(
    folder: Path,
    *,
    classes: tuple[str, ...] | None = None,
    max_unreadable: float = MAX_UNREADABLE,
    track: Track = silent,
) -> ImageSet:
    """Returns the images below the class folders of a folder, sorted by path; those that can be read.

    Raises:
        DataError: there are class folders that `classes` does not know or that cannot be opened, or too many
            images that cannot be read: a share above `max_unreadable`, or all of a class.
        NothingToCheckError: there are no images.
    """
    found = _class_folders(folder)
    names = classes or found
    if unknown := sorted(set(found) - set(names)):
        raise DataError(
            f"{folder} has class folders {some(unknown)} that the model does not know: {some(names)}"
        )
    index = {name: label for label, name in enumerate(names)}
    if closed := [name for name in found if not os.access(folder / name, os.R_OK | os.X_OK)]:
        raise DataError(f"{folder} has class folders {some(closed)} that cannot be opened: allow it")
    listed = [(path, index[name]) for name in found for path in image_files(folder / name)]
    if not listed:
        raise NothingToCheckError(f"no images in {folder}: expected {folder}/<class>/*.jpg or .png")
    left_out = unreadable(folder, [path for path, _ in listed], most=max_unreadable, track=track)
    files = [(path, k) for path, k in listed if path.relative_to(folder).as_posix() not in left_out]
    if empty := sorted({label for _, label in listed} - {label for _, label in files}):
        raise DataError(
            f"{folder}: no image of class {some([names[label] for label in empty])} can be read: mend them, "
            "or remove the folder"
        )
    digest = hashlib.sha256()
    for path, label in files:
        digest.update(f"{path.relative_to(folder)}\0{label}\0{path.stat().st_size}\n".encode())
    labels = np.array([label for _, label in files], np.int64)
    return ImageSet(
        names,
        labels,
        lambda i: read_image(files[i][0]),
        digest.hexdigest()[:16],
        lambda i: files[i][0].relative_to(folder).as_posix(),
        tuple(left_out),
    )


def load_new_images(source: str, classes: Sequence[str], *, track: Track = silent) -> ImageSet:
    """Returns labelled images to learn, of some or all of a model's classes.

    A source is a folder of class folders (of which `train` is taken where there is one), an `.npz` file, or
    named, then the training images of it.

    Raises:
        DataError: the source is unknown, cannot be read, or has classes that the model does not know.
        NothingToCheckError: there are no images.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return npz_images(path, tuple(classes))
    if source in NAMED_SOURCES or not path.is_dir():
        return _splits_of_model(source, tuple(classes))[0]
    whole = path / "train" if (path / "train").is_dir() else path
    return image_folder(whole, classes=tuple(classes), track=track)


def _splits_of_model(
    source: str, classes: tuple[str, ...], root: Path | None = None
) -> tuple[ImageSet, ImageSet]:
    """Returns the images of a named source, which has the classes of a model."""
    train, val = load_splits(source, root=root)
    if train.classes != classes:
        raise DataError(f"{source} has classes {some(train.classes)}, the model has {some(classes)}")
    return train, val


def _downloaded(config: DataConfig) -> Path | None:
    """Returns where a configuration has the IDX files of `fashion-mnist`; None: where Debian has them."""
    if config.download:
        return idx_folder(config.root or Path("data"))
    return config.root


def _chosen(split: tuple[ImageSet, ImageSet], config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Returns as many training and validation images of a split as a configuration wants."""
    train, val = split
    return train.sample(config.train_images, seed=0), val.sample(config.val_images, seed=0)


def _undivided(folder: Path) -> Path:
    """Returns where the class folders are of a folder without validation images."""
    return folder / "train" if _class_folders(folder) == ("train",) else folder


def _validation_folder(folder: Path) -> Path | None:
    return next((folder / name for name in VALIDATION_FOLDERS if (folder / name).is_dir()), None)


def _class_folders(folder: Path) -> tuple[str, ...]:
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}: check the folder") from error
    if odd := [name for name in names if _NO_NAME.search(name)]:
        raise DataError(
            f"{folder} has class folders {some(map(ascii, odd))}, "
            "whose names no manifest can have: rename them"
        )
    return tuple(names)
