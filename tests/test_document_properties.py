"""What is written is read again as the same: configurations, manifests, plans, reports, states, images."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import make_manifest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_inputs import HOST

from wasi_export.array_images import npz_images, write_npz
from wasi_export.config import Config, Thresholds
from wasi_export.durable import write_bytes
from wasi_export.errors import ConfigError, MalformedError
from wasi_export.image_set import ImageSet
from wasi_export.manifest import FileEntry, InputSpec, Manifest
from wasi_export.ranks import ActivationRanks, LayerPlan, Plan
from wasi_export.report import Check, Report
from wasi_export.runtimes.adapt import AdaptProgress
from wasi_export.runtimes.state_folder import StateFolder
from wasi_export.runtimes.validate import read_report, write_report
from wasi_export.untrusted.document import parse_document

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)
NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
NUMBERS = st.floats(-1e9, 1e9)
COUNTS = st.integers(1, 10**6)
SHARES = st.floats(0.01, 0.99)


def maybe(strategy):
    return st.none() | strategy


KWARGS = st.dictionaries(NAMES, st.integers() | WORDS)
PATTERNS = st.lists(WORDS).map(tuple)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES,
        "seed": st.integers(0, 2**31),
        "model": st.fixed_dictionaries({}, optional={"name": WORDS, "img_size": COUNTS, "kwargs": KWARGS}),
        "data": st.fixed_dictionaries(
            {}, optional={"source": WORDS, "val_fraction": SHARES, "scale": st.tuples(SHARES, SHARES)}
        ),
        "subspace": st.fixed_dictionaries({}, optional={"epsilon": SHARES, "include": PATTERNS}),
        "train": st.fixed_dictionaries(
            {}, optional={"dense": st.fixed_dictionaries({}, optional={"lr": SHARES, "clip_grad": SHARES})}
        ),
        "thresholds": st.fixed_dictionaries({}, optional={"min_accuracy": SHARES, "max_size_mb": SHARES}),
    },
)  # fmt: skip
LAYERS = st.builds(
    LayerPlan,
    name=WORDS,
    in_features=COUNTS,
    out_features=COUNTS,
    rank=maybe(COUNTS),
    method=maybe(st.sampled_from(["plain", "whitened", "sequential"])),
    energy=maybe(SHARES),
    activation=st.builds(
        ActivationRanks, feature=maybe(COUNTS), batch=maybe(COUNTS), batch_count=maybe(COUNTS)
    ),
    tokens=maybe(COUNTS),
    reason=WORDS,
)
CHECKS = st.builds(
    Check,
    name=WORDS,
    status=st.sampled_from(["passed", "failed", "undecided", "no data", "info"]),
    value=maybe(NUMBERS),
    threshold=maybe(NUMBERS),
    detail=st.text(st.characters(codec="utf-8"), max_size=12),
)


@given(CONFIGS)
def test_a_configuration_is_the_same_after_toml(values):
    config = Config.from_mapping(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(config.to_toml(), encoding="utf-8")
        assert Config.from_toml(path) == config


@given(CONFIGS, SHARES)
def test_an_override_changes_its_key_alone(values, share):
    before = Config.from_mapping(values)
    after = Config.from_mapping(values, [f"data.val_fraction={share!r}"])
    assert after.data.val_fraction == share
    assert after.model_copy(update={"data": before.data}) == before


@given(st.lists(st.text(max_size=30), max_size=3))
def test_overrides_are_taken_or_refused_with_a_reason(texts):
    try:
        config = Config.from_mapping({}, texts)
    except ConfigError:
        pass
    else:
        assert Config.from_mapping(config.model_dump(exclude_none=True)) == config


@given(NAMES)
def test_an_unknown_key_is_refused_by_its_name(name):
    key = f"{name}_"
    with pytest.raises(ConfigError, match="unknown key") as caught:
        Config.from_mapping({key: 1})
    assert repr(key) in str(caught.value)


@given(st.dictionaries(st.sampled_from(sorted(Thresholds.model_fields)), st.floats(allow_nan=True)))
def test_a_threshold_is_never_a_nan(values):
    try:
        found = Thresholds.from_toml(None, values)
    except ConfigError:
        return
    assert all(value is None or value == value for _, value in found)


@given(st.lists(LAYERS, max_size=3), st.dictionaries(NAMES, NUMBERS, max_size=3), st.lists(WORDS, max_size=4))
def test_a_manifest_is_the_same_after_json(layers, metrics, classes):
    entry = FileEntry(sha256="0" * 64, size_bytes=1)
    old = make_manifest(classes=tuple(classes))
    manifest = old.model_copy(
        update={
            "model": old.model.model_copy(update={"layers": tuple(layers)}),
            "metrics": metrics,
            "files": {"model.onnx": entry},
        }
    )
    assert parse_document(manifest.model_dump_json(), Manifest) == manifest


@given(st.lists(LAYERS, max_size=4))
def test_a_plan_is_the_same_after_json(layers):
    plan = Plan(activation_mode="feature", layers=tuple(layers))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(plan.model_dump_json())
        assert Plan.load(path) == plan


@given(st.lists(CHECKS, max_size=4), WORDS)
def test_a_report_is_the_same_after_it_was_written(checks, name):
    report = Report(bundle=name, model=name, model_sha256="0" * 64, checks=tuple(checks), host=HOST)
    with tempfile.TemporaryDirectory() as folder:
        write_report(report, Path(folder))
        again = read_report(Path(folder) / "report.json")
    assert again == report
    assert again.exit_code == report.exit_code


@given(
    st.builds(AdaptProgress, key=WORDS, step=COUNTS, loss_sum=NUMBERS, best_accuracy=maybe(SHARES)),
    st.dictionaries(NAMES, st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)), max_size=3),
)
def test_a_state_is_read_as_it_was_committed(progress, values):
    tensors = {name: np.array(numbers, np.float32) for name, numbers in values.items()}
    with tempfile.TemporaryDirectory() as folder:
        states = StateFolder(Path(folder), AdaptProgress, "owner")
        states.commit(progress, tensors)
        found = states.read()
    assert found is not None
    assert found[0] == progress
    assert found[1].keys() == tensors.keys()
    assert all(np.array_equal(found[1][name], tensors[name]) for name in tensors)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document_or_refused(data):
    try:
        parse_document(data, InputSpec)
    except MalformedError:
        pass
    else:
        json.loads(data)


@given(st.binary(max_size=64), st.integers(0, 300))
def test_a_file_has_the_bytes_that_were_written_last(data, size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "below" / "file"
        write_bytes(path, bytes(size))
        write_bytes(path, data)
        assert path.read_bytes() == data
        assert [p.name for p in path.parent.iterdir()] == ["file"]


def numbered(count: int, classes: int = 3) -> ImageSet:
    """Returns images whose grey is their index."""
    labels = np.arange(count) % classes
    return ImageSet(("a", "b", "c"), labels, lambda i: Image.new("L", (1, 1), i), f"{count}")


def greys(images: ImageSet) -> list[int]:
    return [images[i][0].getpixel((0, 0)) for i in range(len(images))]


@given(st.integers(2, 200), SHARES, st.integers(0, 99))
def test_two_parts_are_all_images_once_with_their_labels(count, share, seed):
    images = numbered(count)
    train, val = images.hold_out(share, seed)
    assert sorted(greys(train) + greys(val)) == list(range(count))
    assert min(len(train), len(val)) >= 1
    for part in (train, val):
        assert part.labels.tolist() == [grey % 3 for grey in greys(part)]


@given(st.integers(2, 100), SHARES, st.integers(0, 99))
def test_the_same_seed_gives_the_same_parts(count, share, seed):
    one, two = (numbered(count).hold_out(share, seed) for _ in range(2))
    assert [part.fingerprint for part in one] == [part.fingerprint for part in two]
    assert [greys(part) for part in one] == [greys(part) for part in two]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_joined_images_are_those_of_both_in_order(one, other, seed):
    first, second = numbered(one).sample(None, seed), numbered(other).sample(other, seed)
    joined = first.join(second)
    assert greys(joined) == greys(first) + greys(second)
    assert joined.labels.tolist() == first.labels.tolist() + second.labels.tolist()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_an_archive_of_images_has_the_images_that_were_written(count, height, width, is_grey, seed):
    shape = (count, height, width) if is_grey else (count, height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    made = ImageSet(("a", "b"), np.arange(count) % 2, lambda i: Image.fromarray(pixels[i]), "f")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        write_npz(made, path)
        found = npz_images(path, ("a", "b"))
    assert found.labels.tolist() == made.labels.tolist()
    assert all(np.array_equal(np.asarray(found[i][0]), pixels[i]) for i in range(count))
