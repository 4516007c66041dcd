"""What a bundle says of itself, apart from whether it is whole."""

from datetime import UTC, datetime

import pytest
from helpers import SPEC, make_bundle, make_manifest
from pydantic import ValidationError

from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.config import DataConfig
from wasi_export.durable import fingerprint
from wasi_export.errors import ConfigError, IntegrityError
from wasi_export.manifest import (
    CONFIG,
    GOLDEN,
    MODEL,
    FileEntry,
    InputSpec,
    Manifest,
    Quantized,
    creation_time,
)

INT8 = Quantized(
    form="int8", file="model.int8.onnx", error=0.0123, accuracy_drop=0.025, images=40, latency_ratio=0.554
)


def test_a_quantised_graph_says_what_it_costs_and_gains():
    assert str(INT8) == "int8, accuracy -2.5% on 40 images, error 1.2e-02, 0.55 of the time of fp32"
    better = INT8.model_copy(update={"accuracy_drop": -0.004, "images": 500})
    assert str(better).startswith("int8, accuracy +0.4% on 500 images, ")
    assert "accuracy +0.0% on" in str(INT8.model_copy(update={"accuracy_drop": 0.0}))
    kept = INT8.model_copy(update={"kept": ("head", "fc")})
    assert str(kept) == f"{INT8}, 2 products in fp32"
    assert str(INT8.model_copy(update={"file": None, "reason": "is slower"})) == "no int8: it is slower"


@pytest.mark.parametrize(
    ("quantized", "name"),
    [(None, None), (INT8, "model.int8.onnx"), (INT8.model_copy(update={"file": None}), None)],
)
def test_the_path_of_a_quantised_graph_is_there_where_the_graph_is(quantized, name, tmp_path):
    bundle = Bundle(tmp_path, make_manifest().model_copy(update={"quantized": quantized}))
    assert bundle.quantized_path == (None if name is None else tmp_path / name)
    assert bundle.model_path == tmp_path / MODEL


def test_a_training_is_known_by_its_files_alone(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", training=True))
    files = bundle.manifest.files
    names = sorted(name for name in files if name.startswith("train/"))
    assert names
    assert bundle.training_identity == fingerprint(*(files[name].sha256 for name in names))


@pytest.mark.parametrize("digest", [None, "0123456789abcdef"])
@pytest.mark.parametrize("has_config", [False, True])
def test_a_bundle_knows_its_training_images_where_it_says_which_and_how(digest, has_config, tmp_path):
    path = make_bundle(tmp_path / "bundle")
    (path / CONFIG).write_text("[data]\nval_fraction = 0.4\n")
    if not has_config:
        (path / CONFIG).unlink()
    write_bundle_manifest(path, make_manifest().model_copy(update={"data_fingerprint": digest}))
    expected = (DataConfig(val_fraction=0.4), digest) if digest and has_config else None
    assert Bundle.open(path).trained_on == expected


def test_a_bundle_was_made_now_or_when_it_is_said_to_have_been(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    made = datetime.fromisoformat(creation_time())
    assert abs((datetime.now(UTC) - made).total_seconds()) < 60
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert creation_time() == "1970-01-02T00:00:00Z"


@pytest.mark.parametrize("epoch", ["", "soon", "1e3", "9" * 15, "9" * 18, "9" * 30])
def test_a_time_that_is_no_number_of_seconds_is_refused(epoch, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(ConfigError, match="must be seconds since 1970"):
        creation_time()


@pytest.mark.parametrize(
    "file", ["../outside.onnx", "/etc/hostname", "absent.onnx", "golden/golden.safetensors"]
)
def test_a_quantised_graph_is_a_graph_of_the_bundle(file, tmp_path):
    path = make_bundle(tmp_path / "bundle")
    manifest: Manifest = Bundle.open(path).manifest
    hostile = manifest.model_copy(update={"quantized": INT8.model_copy(update={"file": file})})
    write_bundle_manifest(path, hostile)
    with pytest.raises(IntegrityError):
        Bundle.open(path)


SIZE = 2**14
WITHIN = {
    "height": (1, SIZE),
    "width": (1, SIZE),
    "crop_pct": (0.01, 1.0),
    "channels": (3,),
    "mean": ((0.0, 0.5, 1.0),),
    "std": ((1e-9, 1.0, 1.0),),
}
BEYOND = {
    "height": (0, SIZE + 1),
    "width": (0, SIZE + 1),
    "crop_pct": (0.0099, 1.01),
    "channels": (1, 2, 4),
    "mean": ((0.5,), (0.5,) * 4),
    "std": (
        (0.5,) * 2,
        (0.5,) * 4,
        (1.0, 0.0, 1.0),
        (1.0, -1.0, 1.0),
        (float("inf"),) * 3,
        (float("nan"),) * 3,
    ),
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name in WITHIN for value in WITHIN[name]])
def test_an_input_within_its_bounds_is_one(field, value):
    assert getattr(InputSpec(**{**SPEC.model_dump(), field: value}), field) == value


@pytest.mark.parametrize(("field", "value"), [(name, value) for name in BEYOND for value in BEYOND[name]])
def test_an_input_beyond_its_bounds_is_refused(field, value):
    with pytest.raises(ValidationError):
        InputSpec(**{**SPEC.model_dump(), field: value})


@pytest.mark.parametrize(("channels", "is_taken"), [(0, False), (1, True), (2, False), (3, True), (4, False)])
def test_an_image_is_grey_or_in_colour(channels, is_taken):
    values = {**SPEC.model_dump(), "channels": channels, "mean": (0.5,) * channels, "std": (0.5,) * channels}
    if is_taken:
        assert InputSpec(**values).channels == channels
    else:
        with pytest.raises(ValidationError, match="Input should be 1 or 3"):
            InputSpec(**values)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_every_channel_has_its_mean_and_its_std(count):
    with pytest.raises(ValidationError, match="mean and std need 3 numbers"):
        InputSpec(**{**SPEC.model_dump(), "mean": (0.5,) * count, "std": (0.5,) * count})


def test_an_input_is_whole_and_in_colour_unless_it_says_so():
    spec = InputSpec(height=1, width=1, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert (spec.channels, spec.crop_pct, spec.interpolation) == (3, 1.0, "bicubic")


@pytest.mark.parametrize(("size", "is_size"), [(0, True), (2**31 - 1, True), (-1, False), (2**31, False)])
def test_a_file_has_a_size_that_protobuf_takes(size, is_size):
    if is_size:
        assert FileEntry(sha256="0" * 64, size_bytes=size).size_bytes == size
    else:
        with pytest.raises(ValidationError):
            FileEntry(sha256="0" * 64, size_bytes=size)


@pytest.mark.parametrize(("version", "is_taken"), [("1" * 32, True), ("1" * 33, False), ("1.23.0", True)])
def test_a_version_has_32_characters_at_most(version, is_taken):
    document = make_manifest().model_dump() | {"min_onnxruntime": version}
    if is_taken:
        assert Manifest(**document).min_onnxruntime == version
    else:
        with pytest.raises(ValidationError, match="at most 32 characters"):
            Manifest(**document)


def test_a_bundle_has_a_thousand_files_and_no_more():
    entry = FileEntry(sha256="0" * 64, size_bytes=1)
    document = make_manifest().model_dump()
    files = {f"{index}.onnx": entry for index in range(1000)}
    assert len(Manifest(**{**document, "files": files}).files) == 1000
    with pytest.raises(ValidationError, match="at most 1000 items"):
        Manifest(**{**document, "files": files | {"one-more.onnx": entry}})


@pytest.mark.parametrize("data", [None, b"", b"noise" * 100])
def test_golden_data_that_cannot_be_read_are_refused(data, tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle"))
    (bundle.path / GOLDEN).unlink()
    if data is not None:
        (bundle.path / GOLDEN).write_bytes(data)
    with pytest.raises(IntegrityError, match="holds no golden data"):
        bundle.golden()
