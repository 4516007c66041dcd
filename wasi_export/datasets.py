"""Labelled images, read the same way in training and on the board: Pillow and numpy, no torch.

A source is `digits` (inside scikit-learn), `fashion-mnist` (the four IDX files, as Debian's
`dataset-fashion-mnist` installs them), or a folder:

    folder/<class>/*.jpg                 all images; the validation part is held out by seed
    folder/train/<class>/*.jpg           already split; `val`, `validation` or `test` beside it, or held out

Files of a folder that cannot be read are left out, with a warning; too many of them are an error.
"""

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wasi_export._extras import require
from wasi_export.config import DataConfig
from wasi_export.errors import DataError, HostError, NothingToCheckError
from wasi_export.image_files import MAX_UNREADABLE, image_files, read_image, unreadable

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NAMED_SOURCES = ("digits", "fashion-mnist")
VALIDATION_FOLDERS = ("val", "validation", "test")


@dataclass(frozen=True)
class ImageSet:
    """Images by index, their labels [N] into `classes`, a hash of what they are, and a name for each."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    read: Callable[[int], Image.Image]
    fingerprint: str
    name: Callable[[int], str] = "#{}".format
    unreadable: tuple[str, ...] = ()
    """Names of files that would be among these images, and were left out."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index), int(self.labels[index])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "ImageSet":
        """Returns the images at the indices, in that order."""
        chosen = np.asarray(indices, np.int64)
        digest = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()[:16]
        return replace(
            self,
            labels=self.labels[chosen],
            read=lambda i: self.read(int(chosen[i])),
            fingerprint=digest,
            name=lambda i: self.name(int(chosen[i])),
        )

    def sample(self, count: int | None, seed: int) -> "ImageSet":
        """Returns `count` images drawn without replacement; all of them, in order, for None."""
        if count is None:
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        return self.take(order[:count])

    def hold_out(self, share: float, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """Returns the images in two parts drawn at random, the second of this share, neither empty.

        Raises:
            DataError: there are not two images.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = min(max(1, round(share * len(self))), len(self) - 1)
        if held_out < 1:
            raise DataError(f"{len(self)} image cannot be split into training and validation: add images")
        return self.take(order[held_out:]), self.take(order[:held_out])

    def join(self, other: "ImageSet") -> "ImageSet":
        """Returns the images of both, which have the same classes."""
        count, labels = len(self), np.concatenate((self.labels, other.labels))
        digest = hashlib.sha256(f"{self.fingerprint}{other.fingerprint}".encode()).hexdigest()[:16]
        return ImageSet(
            self.classes,
            labels,
            lambda i: self.read(i) if i < count else other.read(i - count),
            digest,
            lambda i: self.name(i) if i < count else other.name(i - count),
            tuple(dict.fromkeys(self.unreadable + other.unreadable)),
        )


def load_splits(
    source: str,
    *,
    root: Path | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    max_unreadable: float = MAX_UNREADABLE,
) -> tuple[ImageSet, ImageSet]:
    """Returns the training and the validation images of a source.

    Raises:
        DataError: the source is unknown or cannot be read, or too many of its images cannot.
        NothingToCheckError: a folder holds no images.
    """
    if source == "fashion-mnist":
        folder = root or FASHION_MNIST_ROOT
        return _fashion_mnist(folder, "train"), _fashion_mnist(folder, "t10k")
    if source == "digits":
        return _digits().hold_out(val_fraction, seed)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(
            f"no data source {source!r}: give `digits`, `fashion-mnist`, or a folder of class folders"
        )
    validation = _validation_folder(folder)
    if (folder / "train").is_dir() and validation:
        train = image_folder(folder / "train", max_unreadable=max_unreadable)
        return train, image_folder(validation, classes=train.classes, max_unreadable=max_unreadable)
    whole = folder / "train" if _class_folders(folder) == ("train",) else folder
    return image_folder(whole, max_unreadable=max_unreadable).hold_out(val_fraction, seed)


def load_data(config: DataConfig) -> tuple[ImageSet, ImageSet]:
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
        config.source, root=root, val_fraction=config.val_fraction, max_unreadable=config.max_unreadable
    )
    return train.sample(config.train_images, seed=0), val.sample(config.val_images, seed=0)


def download_fashion_mnist(root: Path) -> Path:
    """Returns the folder of IDX files that torchvision downloads below `root`, if they are not there yet.

    Raises:
        HostError: the download failed.
        MissingExtraError: torchvision is not installed.
    """
    folder = root / "FashionMNIST" / "raw"
    if not all((folder / f"{split}-labels-idx1-ubyte").exists() for split in ("train", "t10k")):
        datasets = require("torchvision.datasets", extra="train")
        try:
            datasets.FashionMNIST(str(root), download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise HostError(
                f"torchvision cannot download fashion-mnist to {root} ({reason}): check the network, or set "
                "data.root to a folder of its IDX files"
            ) from error
    return folder


def load_labelled(source: str, classes: Sequence[str], *, root: Path | None = None) -> ImageSet:
    """Returns the images to judge a model with `classes` on: the validation split, a folder or an .npz.

    Raises:
        DataError: the source is unknown, cannot be read, or has other classes.
        NothingToCheckError: a folder holds no images.
    """
    folder = Path(source)
    if folder.suffix == ".npz":
        return npz_images(folder, tuple(classes))
    if source in NAMED_SOURCES or not folder.is_dir():
        images = load_splits(source, root=root)[1]
        if images.classes != tuple(classes):
            raise DataError(f"{source} has classes {_some(images.classes)}, the model has {_some(classes)}")
        return images
    return image_folder(_validation_folder(folder) or folder, classes=tuple(classes))


def load_calibration(source: str, *, root: Path | None = None) -> ImageSet:
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
    left_out = unreadable(folder, files)
    files = [path for path in files if path.relative_to(folder).as_posix() not in left_out]
    if not files:
        raise NothingToCheckError(f"no images in {folder}: calibration needs some, .jpg or .png")
    names = "".join(f"{path.relative_to(folder)}\0{path.stat().st_size}\n" for path in files)
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    labels = np.full(len(files), -1, np.int64)
    return ImageSet((), labels, lambda i: read_image(files[i]), digest, unreadable=tuple(left_out))


def image_folder(
    folder: Path, *, classes: tuple[str, ...] | None = None, max_unreadable: float = MAX_UNREADABLE
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
            f"{folder} has class folders {_some(unknown)} that the model does not know: {_some(names)}"
        )
    index = {name: label for label, name in enumerate(names)}
    if closed := [name for name in found if not os.access(folder / name, os.R_OK | os.X_OK)]:
        raise DataError(f"{folder} has class folders {_some(closed)} that cannot be opened: allow it")
    listed = [(path, index[name]) for name in found for path in image_files(folder / name)]
    if not listed:
        raise NothingToCheckError(f"no images in {folder}: expected {folder}/<class>/*.jpg or .png")
    left_out = unreadable(folder, [path for path, _ in listed], most=max_unreadable)
    files = [(path, k) for path, k in listed if path.relative_to(folder).as_posix() not in left_out]
    if empty := sorted({label for _, label in listed} - {label for _, label in files}):
        raise DataError(
            f"{folder}: no image of class {_some([names[label] for label in empty])} can be read: mend them, "
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


def load_new_images(source: str, classes: Sequence[str], *, root: Path | None = None) -> ImageSet:
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
        images = load_splits(source, root=root)[0]
        if images.classes != tuple(classes):
            raise DataError(f"{source} has classes {_some(images.classes)}, the model has {_some(classes)}")
        return images
    whole = path / "train" if (path / "train").is_dir() else path
    return image_folder(whole, classes=tuple(classes))


def npz_images(path: Path, classes: tuple[str, ...]) -> ImageSet:
    """Returns the images of a numpy archive: `images` [N, H, W] or [N, H, W, 3] of uint8, `labels` [N].

    Raises:
        DataError: it cannot be read, or holds something else.
        NothingToCheckError: there are no images.
    """
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            pixels, labels = archive["images"], archive["labels"]
    except Exception as error:  # of zipfile, zlib, tokenize and numpy: they have no base of their own
        raise DataError(
            f"{path} is not an .npz of `images` and `labels` ({error}): write it with numpy.savez"
        ) from error
    if not (isinstance(pixels, np.ndarray) and isinstance(labels, np.ndarray)):
        raise DataError(f"{path} holds something else than arrays: write it with numpy.savez")
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] != 3):
        raise DataError(
            f"{path}: images must be uint8 [N, H, W] or [N, H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    if 0 in pixels.shape[1:]:
        raise DataError(f"{path}: images have no pixels, got {list(pixels.shape)}: write them anew")
    if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: labels must be integers [{len(pixels)}], got {labels.dtype} {list(labels.shape)}"
        )
    if not len(labels):
        raise NothingToCheckError(f"no images in {path}: add some")
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise DataError(
            f"{path}: labels go from {labels.min()} to {labels.max()}, the model has {len(classes)} classes"
        )
    return _from_arrays(classes, pixels, labels.astype(np.int64))


def write_npz(images: ImageSet, path: Path) -> None:
    """Writes images of one size as the numpy archive that `npz_images` reads."""
    pixels = np.stack([np.asarray(images.read(index)) for index in range(len(images))])
    np.savez(path, images=pixels, labels=images.labels)


def _validation_folder(folder: Path) -> Path | None:
    return next((folder / name for name in VALIDATION_FOLDERS if (folder / name).is_dir()), None)


def _class_folders(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}: check the folder") from error


def _digits() -> ImageSet:
    digits = require("sklearn.datasets", extra="train").load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # 8x8, grey levels 0..16
    return _from_arrays(tuple("0123456789"), pixels, digits.target.astype(np.int64))


def _fashion_mnist(folder: Path, split: str) -> ImageSet:
    pixels = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise DataError(f"{folder}: images {pixels.shape} and labels {labels.shape} do not fit together")
    if labels.size and labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{folder}: label {labels.max()} is not one of the 10 classes of fashion-mnist")
    return _from_arrays(FASHION_MNIST_CLASSES, pixels, labels.astype(np.int64))


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Returns an IDX file of bytes, gzipped or plain: magic 0 0 8 ndim, big-endian sizes, data."""
    plain = path.with_suffix("")
    try:
        data = gzip.decompress(path.read_bytes()) if path.exists() else plain.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"no {path}: install Debian's dataset-fashion-mnist, set data.root to the folder of IDX files, "
            "or data.download = true"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    dims = data[3] if data[:4] in (b"\0\0\x08\1", b"\0\0\x08\3") else 0
    start = 4 + 4 * dims
    shape = np.frombuffer(data, ">u4", count=dims, offset=4).tolist() if dims and len(data) >= start else ()
    if not shape or 0 in shape or len(data) - start != math.prod(shape):
        raise DataError(f"{path} is not a whole IDX file of bytes")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _from_arrays(classes: tuple[str, ...], pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> ImageSet:
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()[:16]
    return ImageSet(classes, labels, lambda i: Image.fromarray(pixels[i]), digest)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
