"""Labelled images: the built-in sources, folders, IDX files, and what is said of broken ones."""

import gzip
import os
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from wasi_export.array_images import FASHION_MNIST_CLASSES, FASHION_MNIST_ROOT, download_fashion_mnist
from wasi_export.config import DataConfig
from wasi_export.datasets import image_folder, load_calibration, load_data, load_labelled, load_splits
from wasi_export.errors import DataError, HostError, NothingToCheckError
from wasi_export.image_files import read_image
from wasi_export.image_set import ImageSet
from wasi_export.progress import T

IDX_FILES = {
    "train-images-idx3-ubyte": (6, 28, 28),
    "train-labels-idx1-ubyte": (6,),
    "t10k-images-idx3-ubyte": (4, 28, 28),
    "t10k-labels-idx1-ubyte": (4,),
}


def add_images(folder: Path, **counts: int) -> Path:
    """Writes so many images for each class; each image has a grey level of its own."""
    level = len(list(folder.rglob("*.png"))) if folder.exists() else 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("L", (5, 4), level).save(folder / name / f"{number:03}.png")
            level += 1
    return folder


def levels(images: ImageSet) -> list[int]:
    """Returns the grey level of every image, which tells which image it is."""
    return [int(np.asarray(images[i][0])[0, 0]) for i in range(len(images))]


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A small fashion-mnist: 6 training and 4 test images, gzipped as the real ones are."""
    for name, shape in IDX_FILES.items():
        values = rng.integers(0, 10, shape, np.uint8)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(values)))
    return tmp_path


def test_digits_are_split_into_two_disjoint_parts_that_are_all_of_it() -> None:
    train, val = load_splits("digits")
    assert (len(train), len(val)) == (1438, 359)
    assert train.classes == val.classes == tuple("0123456789")
    everything = load_splits("digits", val_fraction=1e-9)
    assert len(everything[0]) + len(everything[1]) == 1797

    def key(images: ImageSet) -> list[bytes]:
        return [images[i][0].tobytes() + bytes([images[i][1]]) for i in range(len(images))]

    assert sorted(key(train) + key(val)) == sorted(key(everything[0]) + key(everything[1]))


def test_a_split_depends_on_the_seed_and_on_nothing_else() -> None:
    first, again, other = (load_splits("digits", seed=seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first.labels, again.labels)
    assert first.fingerprint == again.fingerprint
    assert first[0][0].tobytes() == again[0][0].tobytes()
    assert first.fingerprint != other.fingerprint


def test_the_parts_of_a_split_folder_are_disjoint_and_whole(tmp_path: Path) -> None:
    add_images(tmp_path, cat=6, dog=4)
    train, val = load_splits(str(tmp_path), val_fraction=0.3, seed=5)
    assert (len(train), len(val)) == (7, 3)
    assert sorted(levels(train) + levels(val)) == list(range(10))


def test_a_folder_that_is_split_already_keeps_its_split(tmp_path: Path) -> None:
    add_images(tmp_path / "train", cat=2, dog=1)
    add_images(tmp_path / "validation", dog=3)
    train, val = load_splits(str(tmp_path))
    assert train.classes == val.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 1]
    assert val.labels.tolist() == [1, 1, 1]


def test_a_training_folder_alone_is_split_and_is_not_taken_for_a_class(tmp_path: Path) -> None:
    add_images(tmp_path / "train", cat=6, dog=4)
    train, val = load_splits(str(tmp_path))
    assert train.classes == val.classes == ("cat", "dog")
    assert (len(train), len(val)) == (8, 2)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    add_images(tmp_path, car=3, train=3)
    assert load_splits(str(tmp_path))[0].classes == ("car", "train")


def test_images_are_found_in_deeper_folders_and_other_files_are_left(tmp_path: Path) -> None:
    add_images(tmp_path / "cat" / "indoors", tom=1)
    add_images(tmp_path, dog=1, **{".cache": 1})
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    images = image_folder(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: (p / "cat").mkdir()], ids=["empty", "empty class"]
)
def test_a_folder_without_images_is_nothing_to_check(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    with pytest.raises(NothingToCheckError, match="no images in"):
        load_splits(str(tmp_path))


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    add_images(tmp_path, cat=1)
    with pytest.raises(DataError, match="1 image cannot be split"):
        load_splits(str(tmp_path))


def test_an_unknown_source_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data source .*: give `digits`, `fashion-mnist`, or a folder"):
        load_splits(str(tmp_path / "absent"))


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    cut_off(tmp_path / "photo.jpg")
    with pytest.raises(DataError, match=r"photo\.jpg is not an image that can be read"):
        read_image(tmp_path / "photo.jpg")


def cut_off(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])


BROKEN = {
    "empty": (lambda path: path.touch(), "empty"),
    "text": (lambda path: path.write_text("hello"), "no image"),
    "png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n broken"), "no image"),
    "cut off": (cut_off, "truncated"),
    # Pillow warns of more pixels than its limit, which is 1,000 in the test, and refuses twice as many.
    "too large": (lambda path: Image.new("L", (39, 39)).save(path), "could be decompression bomb"),
    "a bomb": (lambda path: Image.new("L", (99, 99)).save(path), "could be decompression bomb"),
    "a dangling link": (lambda path: path.symlink_to(path.with_name("gone")), "No such file"),
    "a loop of links": (lambda path: path.symlink_to(path), "Too many levels"),
    "not allowed": (lambda path: (cut_off(path), path.chmod(0)), "Permission denied"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if kind in ("too large", "a bomb") else 10**6)
    if kind == "not allowed" and os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    add_images(tmp_path, cat=6, dog=6)
    whole = image_folder(tmp_path)
    make, reason = BROKEN[kind]
    make(tmp_path / "cat" / "broken.jpg")
    images = image_folder(tmp_path)
    assert images.unreadable == ("cat/broken.jpg",)
    assert (levels(images), images.labels.tolist()) == (levels(whole), whole.labels.tolist())
    assert images.fingerprint == whole.fingerprint  # which is of what is used
    image_folder(tmp_path)
    (warning,) = caplog.messages  # once
    assert re.fullmatch(
        rf"1 of 13 images in {tmp_path} cannot be read: cat/broken\.jpg \(.*{reason}.*\); left out", warning
    )


def test_what_is_hidden_or_no_file_is_no_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder copied from a Mac has a `._` file beside each one."""
    folder = add_images(tmp_path / ".data" / "images", cat=3, dog=3)
    for path in list(folder.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" * 20)
    for hidden in (".thumbnails", "cat/.thumbnails"):
        add_images(folder / hidden, small=2)
    (folder / "dog" / "x.jpg").mkdir()
    os.mkfifo(folder / "dog" / "pipe.jpg")
    images = image_folder(folder)
    assert (len(images), images.classes, images.unreadable) == (6, ("cat", "dog"), ())
    assert len(load_calibration(str(folder))) == 6
    assert caplog.messages == []


def test_files_that_are_left_out_are_known_in_every_part_and_told_to_ten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_images(tmp_path, cat=200)
    for number in range(12):
        (tmp_path / "cat" / f"a{number:02}.png").touch()
    train, val = load_splits(str(tmp_path))
    assert len(train.unreadable) == len(val.unreadable) == 12
    assert train.join(val).unreadable == train.sample(10, seed=0).unreadable == train.unreadable
    assert caplog.messages[0].endswith("cat/a09.png (empty), and 2 more; left out")


@pytest.mark.parametrize("load", [load_splits, lambda source: load_labelled(source, ["cat", "dog"])])
def test_too_many_files_that_cannot_be_read_are_an_error(
    tmp_path: Path, load: Callable[[str], object]
) -> None:
    add_images(tmp_path, cat=6, dog=6)
    for name in ("a.png", "b.png"):
        (tmp_path / "cat" / name).touch()
    with pytest.raises(DataError, match=r"2 of 14 images .* a share of 0\.1, .* data\.max_unreadable"):
        load(str(tmp_path))


def test_the_share_of_them_is_a_key_of_the_configuration(tmp_path: Path) -> None:
    add_images(tmp_path, cat=1, dog=6)
    (tmp_path / "dog" / "a.png").touch()
    config = DataConfig(source=str(tmp_path), max_unreadable=0.5)
    train, val = load_data(config)
    assert (len(train) + len(val), train.unreadable) == (7, ("dog/a.png",))
    with pytest.raises(DataError, match=r"more than a share of 0\.1"):
        load_data(DataConfig(source=str(tmp_path)))


def test_a_class_of_which_no_image_can_be_read_is_an_error(tmp_path: Path) -> None:
    add_images(tmp_path, cat=20)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").touch()
    with pytest.raises(DataError, match=r"no image of class dog can be read: mend them, or"):
        image_folder(tmp_path)


def test_calibration_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    add_images(tmp_path, cat=10)
    (tmp_path / "cat" / "a.png").touch()
    images = load_calibration(str(tmp_path))
    assert (levels(images), images.unreadable) == (list(range(10)), ("cat/a.png",))


def test_looking_at_the_images_is_shown_and_done_once(tmp_path: Path) -> None:
    shown = []

    def track(items: Iterable[T], label: str, total: int) -> Iterable[T]:
        shown.append((label, total))
        return items

    add_images(tmp_path, cat=3, dog=2)
    assert [len(image_folder(tmp_path, track=track)) for _ in range(2)] == [5, 5]
    assert shown == [(f"looking at {tmp_path}", 5)]


def test_an_image_that_is_gone_since_is_told_so(tmp_path: Path) -> None:
    images = image_folder(add_images(tmp_path, cat=2))
    (tmp_path / "cat" / "000.png").unlink()
    with pytest.raises(DataError, match=r"cat/000\.png is gone: bring the images back"):
        images[0]


def test_a_class_folder_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    add_images(tmp_path, cat=1, horse=1)
    with pytest.raises(DataError, match=r"has class folders horse that the model does not know: cat, dog"):
        load_labelled(str(tmp_path), ["cat", "dog"])


@pytest.mark.parametrize("name", [b"cat\x1b[2J", b"two\nlines", b"\xff"])
def test_a_class_whose_name_no_manifest_can_have_is_refused(tmp_path: Path, name: bytes) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).mkdir()
    with pytest.raises(DataError, match=r"class folders '[ -~]+', whose names no manifest can have: rename"):
        image_folder(tmp_path)


def test_labels_follow_the_classes_of_the_model_and_not_of_the_folder(tmp_path: Path) -> None:
    add_images(tmp_path, dog=2)
    images = load_labelled(str(tmp_path), ["cat", "dog"])
    assert images.labels.tolist() == [1, 1]


def test_a_model_is_judged_on_the_validation_folder_where_there_is_one(tmp_path: Path) -> None:
    add_images(tmp_path / "train", cat=5)
    add_images(tmp_path / "test", cat=2)
    assert len(load_labelled(str(tmp_path), ["cat"])) == 2


@pytest.mark.parametrize("below", ["", "train"])
@pytest.mark.parametrize("counts", [{}, {"train_images": 6, "val_images": 2}])
def test_of_the_folder_that_a_model_was_trained_on_what_was_held_out_judges_it(
    tmp_path: Path, below: str, counts: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    add_images(tmp_path / "old" / below, cat=6, dog=4)
    config = DataConfig(source=str(tmp_path / "old"), val_fraction=0.3, **counts)
    train, val = load_data(config)
    (tmp_path / "old").rename(tmp_path / "new")
    judged = load_labelled(str(tmp_path / "new"), train.classes, trained_on=(config, train.fingerprint))
    assert [judged.name(i) for i in range(len(judged))] == [val.name(i) for i in range(len(val))]
    assert (len(judged), judged.labels.tolist()) == (len(val), val.labels.tolist())
    assert f"judged on the {len(val)} images that were held out" in caplog.text


def test_of_another_folder_all_images_judge_a_model(tmp_path: Path) -> None:
    add_images(tmp_path / "old", cat=6, dog=4)
    config = DataConfig(source=str(tmp_path / "old"))
    trained_on = (config, load_data(config)[0].fingerprint)
    add_images(tmp_path / "new", cat=5, dog=5)
    assert len(load_labelled(str(tmp_path / "new"), ["cat", "dog"], trained_on=trained_on)) == 10


def test_a_built_in_source_with_other_classes_is_refused() -> None:
    with pytest.raises(DataError, match=r"digits has classes 0, 1, 2, 3, 4, …, the model has cat, dog"):
        load_labelled("digits", ["cat", "dog"])


def test_the_fingerprint_changes_with_the_images(tmp_path: Path) -> None:
    add_images(tmp_path, cat=2)
    before = image_folder(tmp_path).fingerprint
    assert image_folder(tmp_path).fingerprint == before
    add_images(tmp_path, dog=1)
    assert image_folder(tmp_path).fingerprint != before


def test_a_sample_draws_without_replacement_and_the_same_again(tmp_path: Path) -> None:
    images = image_folder(add_images(tmp_path, cat=20))
    drawn = levels(images.sample(8, seed=3))
    assert len(set(drawn)) == 8
    assert levels(images.sample(8, seed=3)) == drawn
    assert levels(images.sample(8, seed=4)) != drawn
    assert levels(images.sample(100, seed=3)) != levels(images.sample(None, seed=3)) == list(range(20))


def test_idx_files_are_read_as_training_and_test_images(idx_folder: Path) -> None:
    train, val = load_splits("fashion-mnist", root=idx_folder)
    assert (len(train), len(val)) == (6, 4)
    assert train.classes == FASHION_MNIST_CLASSES
    stored = gzip.decompress((idx_folder / "train-images-idx3-ubyte.gz").read_bytes())[16 : 16 + 28 * 28]
    assert train[0][0].tobytes() == stored


def test_idx_files_may_be_unpacked(idx_folder: Path) -> None:
    packed = load_splits("fashion-mnist", root=idx_folder)[0]
    for name in IDX_FILES:
        path = idx_folder / f"{name}.gz"
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert load_splits("fashion-mnist", root=idx_folder)[0].fingerprint == packed.fingerprint


def downloaded(files: Path, root: Path) -> DataConfig:
    """Puts IDX files where torchvision does; returns the configuration that finds them there."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES:
        (raw / name).write_bytes(gzip.decompress((files / f"{name}.gz").read_bytes()))
    return DataConfig(source="fashion-mnist", root=root, download=True)


def test_what_torchvision_downloaded_before_is_not_downloaded_again(idx_folder: Path, tmp_path: Path) -> None:
    train, val = load_data(downloaded(idx_folder, tmp_path / "data"))
    assert (len(train), len(val)) == (6, 4)


def test_a_model_is_judged_on_the_images_that_were_downloaded_to_train_it(
    idx_folder: Path, tmp_path: Path
) -> None:
    config = downloaded(idx_folder, tmp_path / "data")
    train, val = load_data(config)
    judged = load_labelled("fashion-mnist", train.classes, trained_on=(config, train.fingerprint))
    assert judged.fingerprint == val.fingerprint


def test_a_folder_may_lack_as_many_images_as_in_training(tmp_path: Path) -> None:
    add_images(tmp_path, cat=6, dog=6)
    for name in ("000", "001", "002"):
        (tmp_path / "cat" / f"{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="3 of 12 images"):
        load_labelled(str(tmp_path), ["cat", "dog"])
    trained_on = (DataConfig(source="elsewhere", max_unreadable=0.5), "")
    assert len(load_labelled(str(tmp_path), ["cat", "dog"], trained_on=trained_on)) == 9


def test_a_download_that_fails_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        HostError, match=r"torchvision cannot download fashion-mnist .*: check the network, or"
    ):
        download_fashion_mnist(tmp_path / "file")


def test_missing_idx_files_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*train-images.*: install Debian's dataset-fashion-mnist, set"):
        load_splits("fashion-mnist", root=tmp_path)


def short_data(packed: bytes) -> bytes:
    return gzip.compress(gzip.decompress(packed)[:-1])


def another_type(packed: bytes) -> bytes:
    return gzip.compress(b"\0\0\x0d" + gzip.decompress(packed)[3:])


def short_header(packed: bytes) -> bytes:
    return gzip.compress(gzip.decompress(packed)[:6])


def short_gzip(packed: bytes) -> bytes:
    return packed[:-20]


def corrupt_gzip(packed: bytes) -> bytes:
    return packed[:20] + bytes(40) + packed[60:]


def no_gzip(packed: bytes) -> bytes:
    return b"hello"


BREAK = [short_data, another_type, short_header, short_gzip, corrupt_gzip, no_gzip]


@pytest.mark.parametrize("damage", BREAK, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_a_broken_idx_file_is_named(idx_folder: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = idx_folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"(cannot read .*{name}|{name} is not a whole IDX file)"):
        load_splits("fashion-mnist", root=idx_folder)


def test_images_and_labels_must_be_as_many(idx_folder: Path) -> None:
    labels = gzip.compress(idx_bytes(np.zeros(5, np.uint8)))
    (idx_folder / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    with pytest.raises(DataError, match=r"images \(6, 28, 28\) and labels \(5,\) do not fit together"):
        load_splits("fashion-mnist", root=idx_folder)


def test_a_label_beyond_the_classes_is_refused(idx_folder: Path) -> None:
    labels = gzip.compress(idx_bytes(np.full(6, 10, np.uint8)))
    (idx_folder / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    with pytest.raises(DataError, match="label 10 is not one of the 10 classes"):
        load_splits("fashion-mnist", root=idx_folder)


@pytest.mark.skipif(not FASHION_MNIST_ROOT.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_debian_package_holds_fashion_mnist() -> None:
    train, val = load_splits("fashion-mnist")
    assert (len(train), len(val)) == (60_000, 10_000)
    assert np.bincount(val.labels).tolist() == [1000] * 10
    assert train[0][0].size == (28, 28)
