"""Bundles that notice any change."""

import errno
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.durable import file_sha256
from wasi_export.errors import IntegrityError
from wasi_export.manifest import GOLDEN, MANIFEST, MANIFEST_DIGEST, MODEL

FILES = (MODEL, GOLDEN, "config.toml", MANIFEST, MANIFEST_DIGEST)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def flip(path: Path, position: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def test_a_finished_bundle_opens_and_lists_every_file_but_its_own_two(finished_bundle: Path) -> None:
    opened = Bundle.open(finished_bundle)
    assert set(opened.manifest.files) == {MODEL, GOLDEN, "config.toml"}
    assert opened.model_path.is_file()
    golden = opened.golden()
    assert golden.images.shape == (5, 3, 4, 4)
    assert golden.images.dtype == np.float32
    assert golden.labels.tolist() == golden.outputs.argmax(axis=1).tolist()


def test_the_wanted_files_are_copied_with_their_folders(learning_bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(learning_bundle)
    wanted = {name for name in opened.manifest.files if name.startswith("train/")} | {MODEL}
    assert len(wanted) > 2
    opened.copy_files(tmp_path, wanted.__contains__)
    assert names(tmp_path) == wanted | {"train"}
    assert all(file_sha256(tmp_path / name) == opened.manifest.files[name].sha256 for name in wanted)


def test_a_manifest_is_read_back_as_it_was_written(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    before = (bundle / MANIFEST).read_bytes()
    assert before.startswith(b'{\n  "')  # a person can read it, too
    write_bundle_manifest(bundle, manifest)
    assert (bundle / MANIFEST).read_bytes() == before
    assert Bundle.open(bundle).manifest == manifest


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="the sha256sum of coreutils is not installed")
def test_the_hash_of_the_manifest_is_what_sha256sum_checks(finished_bundle: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST_DIGEST], cwd=finished_bundle, check=True)


@settings(max_examples=60)
@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_any_changed_byte_of_any_file_is_found(
    finished_bundle: Path, tmp_path_factory: pytest.TempPathFactory, name: str, share: float, mask: int
) -> None:
    bundle = Path(shutil.copytree(finished_bundle, tmp_path_factory.mktemp("flipped") / "bundle"))
    flip(bundle / name, int(share * (bundle / name).stat().st_size), mask)
    with pytest.raises(IntegrityError) as caught:
        Bundle.open(bundle)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        Bundle.open(bundle)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_file_of_another_size_is_told_with_both_sizes(bundle: Path, more: int) -> None:
    size = (bundle / MODEL).stat().st_size
    os.truncate(bundle / MODEL, size + more)
    with pytest.raises(
        IntegrityError, match=rf"model\.onnx has {size + more} bytes, the manifest says {size}:"
    ):
        Bundle.open(bundle)


def test_a_file_of_another_hash_is_told_with_both_hashes(bundle: Path) -> None:
    before = file_sha256(bundle / MODEL)
    flip(bundle / MODEL, -1, 1)
    now = file_sha256(bundle / MODEL)
    message = f"model.onnx has sha256 {now[:12]}…, the manifest says {before[:12]}…: export it again"
    with pytest.raises(IntegrityError) as caught:
        Bundle.open(bundle)
    assert message in str(caught.value)


def test_a_disk_that_cannot_be_read_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as disk:
        disk.setattr(hashlib, "file_digest", fail)
        with pytest.raises(IntegrityError, match=r"bundle .* cannot be read: .*Input/output error"):
            Bundle.open(bundle)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(IntegrityError, match=r"manifest\.json is not a manifest: .*Input/output error"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        Bundle.open(bundle)


def test_a_file_that_the_manifest_does_not_list_is_named(bundle: Path) -> None:
    (bundle / "golden" / "more.bin").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"golden/more\.bin is not in the manifest"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_refused_even_to_the_same_bytes(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = Path(shutil.move(bundle / name, tmp_path / "elsewhere"))
    (bundle / name).symlink_to(elsewhere)
    with pytest.raises(IntegrityError, match="is a link or not a plain file"):
        Bundle.open(bundle)


def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.move(bundle / "golden", tmp_path / "elsewhere"))
    (bundle / "golden").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(IntegrityError, match="golden is not in the manifest"):
        Bundle.open(bundle)


def test_all_differences_are_told_at_once(bundle: Path) -> None:
    (bundle / MODEL).unlink()
    flip(bundle / "config.toml", 0, 1)
    with pytest.raises(IntegrityError) as caught:
        Bundle.open(bundle)
    assert "model.onnx is missing" in str(caught.value)
    assert "config.toml has sha256" in str(caught.value)


def test_a_bundle_needs_a_model(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    (bundle / MODEL).unlink()
    write_bundle_manifest(bundle, manifest)
    with pytest.raises(IntegrityError, match=r"the manifest lists no model\.onnx"):
        Bundle.open(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"has no manifest\.json"):
        Bundle.open(tmp_path)


def test_a_path_that_is_no_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"no bundle at .*absent: give the folder that"):
        Bundle.open(tmp_path / "absent")


def test_a_manifest_of_another_schema_is_refused(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text().replace('"schema_version": 1', '"schema_version": 2')
    (bundle / MANIFEST).write_text(text)
    (bundle / MANIFEST_DIGEST).write_text(f"{file_sha256(bundle / MANIFEST)}  {MANIFEST}\n")
    with pytest.raises(IntegrityError, match=r"is not a manifest: .*schema_version"):
        Bundle.open(bundle)


def test_golden_data_of_another_kind_is_refused(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    save_file({"images": np.zeros((5, 3, 4, 5), np.float32)}, bundle / GOLDEN)
    write_bundle_manifest(bundle, manifest)
    with pytest.raises(IntegrityError, match=r"holds no golden data of this model but .*\[5, 3, 4, 5\]"):
        Bundle.open(bundle).golden()


def test_golden_labels_are_one_for_each_image(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    golden = opened.golden()
    for labels in (np.int64(3), golden.labels[:4], golden.labels[:, None]):
        tensors = {"images": golden.images, "outputs": golden.outputs, "labels": np.array(labels)}
        save_file(tensors, bundle / GOLDEN)
        with pytest.raises(IntegrityError, match="holds no golden data of this model but"):
            opened.golden()
