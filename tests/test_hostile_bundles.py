"""Bundles by someone who can compute hashes: what is refused although every hash is right.

The classes of attacks on loaders of models that are known by number; those of external data are all in
`untrusted/test_graph.py`.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import make_bundle, make_model
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.cli import app
from wasi_export.errors import IntegrityError
from wasi_export.manifest import GOLDEN, MANIFEST, MANIFEST_DIGEST, MODEL, SIGNATURE

ALL = (MODEL, GOLDEN, "config.toml", MANIFEST, MANIFEST_DIGEST)


def refused(bundle: Path, reason: str) -> None:
    """Asserts that the bundle is refused on one line, by the library and by the command."""
    with pytest.raises(IntegrityError, match=reason) as caught:
        Bundle.open(bundle)
    assert str(caught.value).isprintable()
    done = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (6, "", 1)


def write_manifest(bundle: Path, text: str) -> None:
    """Writes a manifest, and its hash as it should be."""
    (bundle / MANIFEST).write_text(text)
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    (bundle / MANIFEST_DIGEST).write_text(f"{digest}  {MANIFEST}\n")


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((bundle / MANIFEST).read_text())
    edit(values)
    write_manifest(bundle, json.dumps(values))


def edit_model(bundle: Path, edit: Callable[[onnx.ModelProto], object]) -> None:
    manifest = Bundle.open(bundle).manifest
    model = onnx.ModelProto.FromString((bundle / MODEL).read_bytes())
    edit(model)
    (bundle / MODEL).write_bytes(model.SerializeToString())
    write_bundle_manifest(bundle, manifest)


@pytest.mark.parametrize("name", ALL)
def test_a_file_that_can_be_changed_under_another_name_is_refused(
    bundle: Path, tmp_path: Path, name: str
) -> None:
    os.link(bundle / name, tmp_path / "another name")
    refused(bundle, "is a link or not a plain file")


@pytest.mark.parametrize("name", [*ALL, SIGNATURE])
def test_what_is_no_file_is_refused_and_not_waited_for(bundle: Path, name: str) -> None:
    (bundle / name).unlink(missing_ok=True)
    os.mkfifo(bundle / name)
    refused(bundle, "is a link or not a plain file")


@pytest.mark.parametrize(
    "name",
    [
        "../evil.onnx",
        "golden/../../evil.onnx",
        "/etc/passwd",
        "/etc/x.json",
        "./model.onnx",
        "golden//golden.safetensors",
        "C:\\x.onnx",
        "\\\\host\\share\\x.onnx",
        "..\\x.onnx",
        ".hidden.json",
        "\x1b[2J.md",
        "a\nb.md",
        "weights.pkl",
        "weights.pt",
        "run.sh",
        "model.onnx ",
        "",
    ],
)
def test_a_name_that_leaves_the_folder_or_is_of_no_kind_of_ours_is_refused(bundle: Path, name: str) -> None:
    edit_manifest(bundle, lambda m: m["files"].update({name: {"sha256": "0" * 64, "size_bytes": 0}}))
    refused(bundle, "is not a manifest: .*(should match pattern|control characters)")


def test_more_files_than_any_bundle_has_are_refused(bundle: Path) -> None:
    entry = {"sha256": "0" * 64, "size_bytes": 0}
    edit_manifest(bundle, lambda m: m["files"].update({f"{i}.json": entry for i in range(1000)}))
    refused(bundle, "is not a manifest: 'files': .*at most 1000 items")


def test_a_file_of_a_size_that_nothing_of_ours_has_is_refused_before_it_is_read(bundle: Path) -> None:
    with (bundle / MODEL).open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no space
    refused(bundle, "has 1099511627776 bytes, the manifest says")
    edit_manifest(bundle, lambda m: m["files"][MODEL].update(size_bytes=2**40))
    refused(bundle, "is not a manifest: 'files.model.onnx.size_bytes'")
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(2**40)
    refused(bundle, "is not what")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"created": "2026 |\n\n<script>alert(1)</script>\n\n# owned"}, "'created': .*match pattern"),
        ({"created": "2026-13-01T00:00:00Z"}, "'created': Value error, month must be in 1..12"),
        ({"created": "2026-01-01T00:00:00Z\n"}, "'created': .*match pattern"),
        ({"min_onnxruntime": "1.23\n\n# owned"}, "'min_onnxruntime': .*match pattern"),
        ({"min_onnxruntime": "9" * 5000}, "'min_onnxruntime': .*at most 32 characters"),
        ({"tools": {"": "1"}}, "'tools.*match pattern"),
    ],
)
def test_a_manifest_with_times_and_versions_that_are_none_is_refused(
    bundle: Path, change: dict[str, object], reason: str
) -> None:
    edit_manifest(bundle, lambda m: m.update(change))
    refused(bundle, f"is not a manifest: {reason}")


def test_a_manifest_that_two_readers_read_differently_is_refused(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text()
    write_manifest(bundle, text.replace('"seed": 0', '"seed": 1, "seed": 0'))
    refused(bundle, "is not a manifest: the key 'seed' stands twice")


def test_a_manifest_with_numbers_that_are_none_is_refused(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text()
    assert '"parity_error": 1e-7' in text
    write_manifest(bundle, text.replace('"parity_error": 1e-7', '"parity_error": NaN'))
    refused(bundle, "is not a manifest: NaN is no number")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "", "\ud800".encode("utf-8", "surrogatepass")]
)
def test_what_is_no_manifest_is_refused(bundle: Path, text: str | bytes) -> None:
    write_manifest(bundle, text if isinstance(text, str) else "")
    if isinstance(text, bytes):
        (bundle / MANIFEST).write_bytes(text)
        (bundle / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")
    refused(bundle, "is not a manifest")


@pytest.mark.parametrize("name", ["classes", "tools", "metrics"])
def test_what_a_terminal_obeys_is_refused_wherever_it_stands(bundle: Path, name: str) -> None:
    evil = "\x1b]0;evil\x07"
    values = {"classes": [evil, "light"], "tools": {"torch": evil}, "metrics": {evil: 1.0}}
    edit_manifest(bundle, lambda m: m.update({name: values[name]}))
    refused(bundle, "control characters")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"height": 2**30}, "less than or equal to 16384"),
        ({"height": 0}, "greater than or equal to 1"),
        ({"channels": 4}, "Input should be 1 or 3"),
        ({"height": 5}, r"model\.onnx is not safe to open: it has the input .*\(3, 5, 4\)"),
        ({"name": "pixels"}, r"model\.onnx is not safe to open: it has the input .*'pixels'"),
    ],
)
def test_an_input_that_is_absurd_or_not_the_graphs_is_refused(
    bundle: Path, change: dict[str, object], reason: str
) -> None:
    edit_manifest(bundle, lambda m: m["input"].update(change))
    refused(bundle, reason)


def test_classes_that_are_not_the_graphs_are_refused(bundle: Path) -> None:
    edit_manifest(bundle, lambda m: m["classes"].append("third"))
    refused(bundle, r"model\.onnx is not safe to open: it has the output .*\(3,\)")


def test_external_data_are_refused_although_the_file_is_in_the_bundle(bundle: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        (bundle / "weights.json").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.json")

    edit_model(bundle, edit)
    refused(bundle, r"model\.onnx is not safe to open: the data of 'right' are in another file")


def test_operators_of_others_are_refused(bundle: Path) -> None:
    edit_model(bundle, lambda model: setattr(model.graph.node[0], "domain", "evil"))
    refused(bundle, "needs operators outside the standard, of 'evil'")


def test_weights_that_are_no_numbers_are_refused(bundle: Path) -> None:
    edit_model(
        bundle,
        lambda m: setattr(m.graph.initializer[0], "raw_data", np.full(96, np.nan, np.float32).tobytes()),
    )
    refused(bundle, "'right' holds 96 NaN or infinite numbers")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_golden_data_that_are_no_numbers_are_refused(bundle: Path, bad: float) -> None:
    manifest = Bundle.open(bundle).manifest
    tensors = load_file(bundle / GOLDEN)
    tensors["outputs"][0, 0] = bad
    save_file(tensors, bundle / GOLDEN)
    write_bundle_manifest(bundle, manifest)
    refused(bundle, "'outputs' holds 1 NaN or infinite numbers")


def test_a_training_step_of_someone_else_is_looked_at_too(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", training=True)
    manifest = Bundle.open(bundle).manifest
    step = onnx.ModelProto.FromString((bundle / "train/step.onnx").read_bytes())
    step.graph.node[0].domain = "evil"
    (bundle / "train/step.onnx").write_bytes(step.SerializeToString())
    write_bundle_manifest(bundle, manifest)
    refused(bundle, r"train/step\.onnx is not safe to open")


@pytest.mark.parametrize("content", [b"\x80\x04\x95cos\nsystem\n", make_model()[:100], b"PK\x03\x04"])
def test_nothing_but_onnx_is_opened_as_a_model(bundle: Path, content: bytes) -> None:
    manifest = Bundle.open(bundle).manifest
    (bundle / MODEL).write_bytes(content)
    write_bundle_manifest(bundle, manifest)
    refused(bundle, r"model\.onnx is not safe to open: it ")


def test_archives_are_not_unpacked(finished_bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for name in ALL:
            archive.write(finished_bundle / name, name)
    refused(tmp_path / "bundle.zip", "no bundle at .*: give the folder")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.zip"]
