"""Images that come as arrays: digits of scikit-learn, the IDX files of Fashion-MNIST, archives of numpy."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wasi_export._extras import require
from wasi_export.errors import DataError, HostError, NothingToCheckError, first_line
from wasi_export.image_set import ImageSet

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def digits() -> ImageSet:
    """Returns the 1,797 digits of scikit-learn, 8x8 and grey.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    found = require("sklearn.datasets", extra="train").load_digits()
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)  # 8x8, grey levels 0..16
    return _from_arrays(tuple("0123456789"), pixels, found.target.astype(np.int64))


def fashion_mnist(folder: Path, split: str) -> ImageSet:
    """Returns the images of a split, `train` or `t10k`, of a folder of IDX files, gzipped or plain.

    Raises:
        DataError: a file is missing, or is not what it should be.
    """
    pixels = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise DataError(f"{folder}: images {pixels.shape} and labels {labels.shape} do not fit together")
    if labels.size and labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{folder}: label {labels.max()} is not one of the 10 classes of fashion-mnist")
    return _from_arrays(FASHION_MNIST_CLASSES, pixels, labels.astype(np.int64))


def idx_folder(root: Path) -> Path:
    """Returns the folder of IDX files that torchvision makes below `root`."""
    return root / "FashionMNIST" / "raw"


def download_fashion_mnist(root: Path) -> Path:
    """Returns the folder of IDX files that torchvision downloads below `root`, if they are not there yet.

    Raises:
        HostError: the download failed.
        MissingExtraError: torchvision is not installed.
    """
    folder = idx_folder(root)
    if not all((folder / f"{split}-labels-idx1-ubyte").exists() for split in ("train", "t10k")):
        datasets = require("torchvision.datasets", extra="train")
        try:
            datasets.FashionMNIST(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise HostError(
                f"torchvision cannot download fashion-mnist to {root} ({first_line(error)}): check the "
                "network, or set data.root to a folder of its IDX files"
            ) from error
    return folder


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
