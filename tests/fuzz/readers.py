"""Each reader of ours with valid inputs, ready to be given odd ones.

A reader may return or raise a WasiExportError. What it must not do is in `trial.py`.
"""

import gzip
import hashlib
import io
import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
from fuzz.forms import (
    Form,
    gzip_form,
    json_form,
    lines_form,
    npz_form,
    onnx_form,
    safetensors_form,
    text_form,
    toml_form,
)
from helpers import CLASSES, SPEC, factors, make_bundle, make_manifest, make_model
from PIL import Image
from pydantic import JsonValue, RootModel
from report_inputs import CHECKS, EPOCH, make_board_report, make_latency, make_report, make_run
from safetensors.numpy import save
from training_step_text import evaluate_model, step_model

from wasi_export.array_images import npz_images
from wasi_export.artifact import Bundle, write_bundle_manifest
from wasi_export.cli._config import DEMO
from wasi_export.cli._report_inputs import read_inputs
from wasi_export.cli._stages import StageCache
from wasi_export.config import Config, Thresholds
from wasi_export.datasets import load_splits
from wasi_export.durable import file_sha256
from wasi_export.image_files import read_image
from wasi_export.junit import to_junit
from wasi_export.manifest import GOLDEN, MANIFEST, MANIFEST_DIGEST, MODEL, Merged, Quantized
from wasi_export.ranks import ActivationRanks, LayerPlan, Plan
from wasi_export.report import BoardRun, BoardSample
from wasi_export.report_page import render_page
from wasi_export.run_folder import FACTS, WEIGHTS, RunFacts
from wasi_export.runtimes.adapt import AdaptProgress
from wasi_export.runtimes.augment import augmented
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.state_folder import PREVIOUS, STATE, StateFolder
from wasi_export.runtimes.targets.connection import Address
from wasi_export.runtimes.validate import read_report
from wasi_export.untrusted.document import parse_document
from wasi_export.untrusted.graph import check_graph
from wasi_export.views import to_markdown

OWNER = "0123456789abcdef"
_PAGE_INSERTS = re.compile(rb"<script|<img|<iframe|\son\w+=|src=[\"']?http|javascript:", re.IGNORECASE)


AnyDocument = RootModel[JsonValue]


@dataclass(frozen=True)
class Reader:
    """One reader: `prepare` writes what lies beside an input into a folder and returns valid inputs."""

    name: str
    form: Form | None
    prepare: Callable[[Path], list[bytes]]
    read: Callable[[bytes, Path], None]
    needs_torch: bool = False


def prepare_manifest(folder: Path) -> list[bytes]:
    path = make_bundle(folder / "bundle", training=True)
    plain = Bundle.open(path).manifest
    shutil.copy(path / MODEL, path / "model.int8.onnx")
    facts = {"error": 0.1, "accuracy_drop": 0, "images": 9, "latency_ratio": 1}
    quantized = Quantized(form="int8", file="model.int8.onnx", **facts)
    merged = Merged(bundle="0" * 64, states=("1" * 64,), shares=(1.0,))
    write_bundle_manifest(path, plain.model_copy(update={"quantized": quantized, "merged": merged}))
    whole = Bundle.open(path).manifest
    none = Quantized(form="int8", file=None, reason="is slower", **facts)
    return [whole.model_copy(update=of).model_dump_json().encode() for of in ({}, {"quantized": none})]


def read_manifest(data: bytes, folder: Path) -> None:
    path = folder / "bundle"
    (path / MANIFEST).write_bytes(data)
    (path / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n")
    bundle = Bundle.open(path)
    for found in (bundle.model_path, bundle.quantized_path):
        assert found is None or found.name in bundle.manifest.files, found
    assert bundle.training_identity
    assert type(bundle.manifest).model_validate_json(bundle.manifest.model_dump_json()) == bundle.manifest
    str(bundle.manifest.quantized), str(bundle.manifest.training)
    Preprocess(bundle.manifest.input)(Image.new("RGB", (5, 3)))


def prepare_golden(folder: Path) -> list[bytes]:
    path = make_bundle(folder / "bundle")
    return [(path / GOLDEN).read_bytes()]


def read_golden(data: bytes, folder: Path) -> None:
    path = folder / "bundle"
    (path / GOLDEN).write_bytes(data)
    golden = Bundle(path, make_manifest()).golden()
    assert golden.images.dtype == golden.outputs.dtype == np.float32


def prepare_graph(folder: Path) -> list[bytes]:
    return [make_model(), make_model(opset=18, ir_version=8, batch="2"), step_model(), evaluate_model()]


def read_graph(data: bytes, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(data)
    facts = check_graph(path)
    assert facts.opset > 0
    assert all(axis is None or axis > 0 for shape in facts.inputs.values() for axis in shape)


def prepare_document(folder: Path) -> list[bytes]:
    return [b'{"a": [1, -2.5, 1e3, null, true], "b": {"c": "d\\u00e9"}}', b"[]"]


def read_any_document(data: bytes, folder: Path) -> None:
    """What is read as JSON is printed as JSON, and is the same when it is read again."""
    found = parse_document(data, AnyDocument)
    text = json.dumps(found.root, allow_nan=False)
    assert parse_document(text, AnyDocument) == found


def prepare_config(folder: Path) -> list[bytes]:
    whole = Config(name="whole").to_toml()
    budgets = "[subspace]\nallocation = 'output_error'\nmax_params = 5_000_000\nmax_latency_ms = 3.5\n"
    memory = "[train.subspace.memory]\nlevel = 'streamed'\n[adapt]\nupdate = 'wsi'\nactivation = 'feature'\n"
    return [DEMO.read_bytes(), whole.encode(), budgets.encode(), f"{memory}factor_lr = 0.01\n".encode()]


def read_config(data: bytes, folder: Path) -> None:
    path = folder / "config.toml"
    path.write_bytes(data)
    config = Config.from_toml(path)
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.from_toml(path) == config


def prepare_thresholds(folder: Path) -> list[bytes]:
    return [b"max_parity_error = 1e-5\nmin_accuracy = 0.9\nmax_latency_ratio = 0.8\nmax_size_mb = 30\n", b""]


def read_thresholds(data: bytes, folder: Path) -> None:
    path = folder / "thresholds.toml"
    path.write_bytes(data)
    found = Thresholds.from_toml(path)
    for name, value in found:
        assert value is None or value == value, f"{name} is {value}: nothing could be held against it"


def prepare_overrides(folder: Path) -> list[bytes]:
    return [
        b"subspace.rank=64",
        b"subspace.epsilon=0.9\0subspace.rank=8",
        b"model.kwargs.depth=2\0model.name=vit_tiny_patch16_224\0data.scale=[0.5, 1.0]",
        b"train.dense.opt=adamw\0train.subspace.memory.level=fast\0adapt.factor_lr='auto'",
        b"subspace.include=['blocks.*', \"head\"]\0seed=0x10\0export.train_graph=true",
    ]


def read_overrides(data: bytes, folder: Path) -> None:
    texts = data.decode(errors="surrogateescape").split("\0")  # a word of a command has no null byte
    Config.from_mapping({}, texts)


def prepare_plan(folder: Path) -> list[bytes]:
    ranks = ActivationRanks(feature=16, token=8, token_count=65, batch=4, batch_count=32)
    layer = LayerPlan(
        name="blocks.0.mlp.fc1", in_features=192, out_features=768, rank=56, method="sequential", energy=0.9,
        reason="fraction 0.4", activation=ranks, tokens=65, error=0.01, factored_ms=0.1, dense_ms=0.2,
    )  # fmt: skip
    layers = (*make_manifest().model.layers, layer)
    return [Plan(activation_mode="feature+token+batch", layers=layers).model_dump_json().encode()]


def read_plan(data: bytes, folder: Path) -> None:
    path = folder / "plan.json"
    path.write_bytes(data)
    plan = Plan.load(path)
    for layer in plan.factored:
        assert layer.parameters > 0, layer
        layer.activation.batch_rank(7)


def prepare_report(folder: Path) -> list[bytes]:
    samples = (
        BoardSample(seconds=-1.0, throttled=0, celsius=50.5, clock_mhz=2400.0, available_mb=7000, watts=3.0),
        BoardSample(
            seconds=1.0, throttled=0x50005, celsius=80.0, clock_mhz=1500.0, available_mb=6900, watts=6.0
        ),
    )
    board = BoardRun(governor="ondemand", max_clock_mhz=2400.0, seconds=2.0, samples=samples)
    latency = tuple(make_latency(name) for name in ("baseline", "bundle"))
    reports = (make_report(*CHECKS, latency=latency, board=board), make_board_report())
    return [report.model_dump_json().encode() for report in reports]


def read_one_report(data: bytes, folder: Path) -> None:
    path = folder / "report.json"
    path.write_bytes(data)
    report = read_report(path)
    statuses = {check.status for check in report.checks}
    assert report.exit_code != 0 or ("passed" in statuses and not statuses & {"failed", "no data"})
    assert (report.verdict == "passed") == (report.exit_code == 0)
    to_markdown(report).encode()
    ET.fromstring(to_junit(report))
    assert type(report).model_validate_json(report.model_dump_json()) == report


def read_page(data: bytes, folder: Path) -> None:
    (folder / "report.json").write_bytes(data)
    found = _PAGE_INSERTS.search(render_page(read_inputs(folder)))
    assert found is None, f"the page has {found[0]!r}"


def prepare_summary(folder: Path) -> list[bytes]:
    run = make_run(folder / "run")
    return [(run / "report" / "summary.json").read_bytes()]


def read_summary(data: bytes, folder: Path) -> None:
    (folder / "run" / "report" / "summary.json").write_bytes(data)
    render_page(read_inputs(folder / "run"))


def prepare_metrics(folder: Path) -> list[bytes]:
    make_run(folder / "run")
    return [b"\n".join(json.dumps(EPOCH | {"epoch": epoch}).encode() for epoch in (1, 2, 3))]


def read_metrics(data: bytes, folder: Path) -> None:
    (folder / "run" / "subspace" / "metrics.jsonl").write_bytes(data)
    render_page(read_inputs(folder / "run"))


def prepare_stages(folder: Path) -> list[bytes]:
    return [b'{"plan": "0123", "train": "4567"}']


def read_stages(data: bytes, folder: Path) -> None:
    (folder / "stages.json").write_bytes(data)
    stages = StageCache(folder)
    stages.is_done("plan", "0123", ())


def prepare_state(folder: Path) -> list[bytes]:
    states = StateFolder(folder / "state", AdaptProgress, OWNER)
    progress = AdaptProgress(key="k", epoch=1, step=40, best_accuracy=0.5)
    states.commit(progress, factors())
    states.commit(progress.model_copy(update={"step": 41}), factors())
    return [(folder / "state" / name).read_bytes() for name in (STATE, PREVIOUS)]


def read_adapt_state(data: bytes, folder: Path) -> None:
    """The commit before is whole, so whatever lies in the place of the newest one, there is a state."""
    path = folder / "state"
    if not (path / PREVIOUS).exists():
        (path / STATE).replace(path / PREVIOUS)
    before = (path / PREVIOUS).read_bytes()
    (path / STATE).write_bytes(data)
    states = StateFolder(path, AdaptProgress, OWNER)
    found = states.read()
    assert found is not None
    if found[0].step != 41:  # of another training: what is committed next is what is read next
        states.commit(found[0], found[1])
        again = states.read()
        assert again is not None
        assert repr(again[0]) == repr(found[0])
        assert again[1].keys() == found[1].keys()
    (path / PREVIOUS).write_bytes(before)


def prepare_facts(folder: Path) -> list[bytes]:
    (folder / WEIGHTS).write_bytes(save(factors()))
    facts = RunFacts(
        name="tiny", method="subspace", classes=CLASSES, input=SPEC, seed=0, parameters=102,
        metrics={"val_accuracy": 0.75}, data_fingerprint=None, key="k",
        weights_sha256=file_sha256(folder / WEIGHTS),
    )  # fmt: skip
    return [facts.model_dump_json().encode()]


def read_run_facts(data: bytes, folder: Path) -> None:
    from wasi_export.training.checkpoint import require_facts

    (folder / FACTS).write_bytes(data)
    require_facts(folder)


def prepare_checkpoint(folder: Path) -> list[bytes]:
    import torch

    from wasi_export.training.resume import CHECKPOINT, Position, save_position

    model, optimizer = _trained()
    path = folder / CHECKPOINT
    save_position(path, Position(key="k", epoch=1), model, optimizer)
    torch.set_num_threads(1)
    return [path.read_bytes()]


def read_checkpoint(data: bytes, folder: Path) -> None:
    from wasi_export.training.resume import CHECKPOINT, position_to_resume, restore

    path = folder / CHECKPOINT
    path.write_bytes(data)
    position = position_to_resume(path, "k")
    assert position is not None
    restore(path, position, *_trained())


def _trained() -> tuple:
    """Returns the smallest model and its optimiser after a step."""
    import torch

    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def prepare_weights(folder: Path) -> list[bytes]:
    from wasi_export.config import ModelConfig
    from wasi_export.training.checkpoint import save_run
    from wasi_export.training.models import create_model

    config = Config(model=ModelConfig(name="test_vit", img_size=32))
    model = create_model(config.model, len(CLASSES))
    with __import__("torch").no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    facts = RunFacts.model_validate_json(prepare_facts(folder)[0])
    save_run(folder, model, config, facts.model_copy(update={"method": "dense"}))
    return [(folder / WEIGHTS).read_bytes()]


def read_weights(data: bytes, folder: Path) -> None:
    from wasi_export.training.checkpoint import load_run, read_facts

    (folder / WEIGHTS).write_bytes(data)
    facts = RunFacts.model_validate_json((folder / FACTS).read_bytes())
    digest = hashlib.sha256(data).hexdigest()
    (folder / FACTS).write_text(facts.model_copy(update={"weights_sha256": digest}).model_dump_json())
    assert read_facts(folder) is not None
    load_run(folder)


def prepare_address(folder: Path) -> list[bytes]:
    return [b"ssh://pi", b"ssh://user@pi.local:2222/data/my dir", b"ssh://[fe80::1]/", b"ssh://pi5-1.lan:22"]


def read_address(data: bytes, folder: Path) -> None:
    address = Address.parse(data.decode(errors="surrogateescape"))
    words = str(address)
    assert not words.startswith("-"), "ssh would take it for an option"
    assert re.fullmatch(r"[\w.@:-]+", words, re.ASCII), words
    assert address.port is None or 0 <= address.port < 2**16
    assert not re.search(r"[\x00-\x1f:]", address.folder)


def prepare_image(folder: Path) -> list[bytes]:
    seeds = []
    pixels = (np.indices((5, 6)).sum(0) * 20).astype(np.uint8)
    for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK", "I;16"):
        for kind in ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF"):
            packed = io.BytesIO()
            try:
                image = Image.fromarray(pixels).convert(mode)
                image.save(packed, kind, **({"compression": "tiff_deflate"} if kind == "TIFF" else {}))
            except (OSError, ValueError):  # a format has not every mode
                continue
            seeds.append(packed.getvalue())
    return seeds


def read_one_image(data: bytes, folder: Path) -> None:
    path = folder / "image.png"
    path.write_bytes(data)
    image = read_image(path)
    inputs = Preprocess(SPEC)(image)
    assert inputs.shape == (3, SPEC.height, SPEC.width)
    assert np.isfinite(inputs).all()
    assert augmented(image.convert("RGB"), SPEC, 0).size == (SPEC.width, SPEC.height)


def prepare_npz(folder: Path) -> list[bytes]:
    seeds = []
    for pixels in (np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 5, 3), np.uint8)):
        for save_arrays in (np.savez, np.savez_compressed):
            packed = io.BytesIO()
            save_arrays(packed, images=pixels, labels=np.array([0, 1, 1]))
            seeds.append(packed.getvalue())
    return seeds


def read_npz(data: bytes, folder: Path) -> None:
    path = folder / "images.npz"
    path.write_bytes(data)
    images = npz_images(path, CLASSES)
    image, label = images[0]
    assert image.width > 0
    assert 0 <= label < len(CLASSES)


def prepare_idx(folder: Path) -> list[bytes]:
    pixels = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(range(18))
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(pixels)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", 2) + b"\0\1")
    return [pixels, gzip.compress(pixels, 1)]


def read_idx(data: bytes, folder: Path) -> None:
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.unlink(missing_ok=True)
    path = packed if data[:2] == b"\x1f\x8b" else packed.with_suffix("")
    path.write_bytes(data)
    train, _ = load_splits("fashion-mnist", root=folder)
    if len(train):
        train[0]


READERS = {
    reader.name: reader
    for reader in (
        Reader("manifest", json_form, prepare_manifest, read_manifest),
        Reader("golden", safetensors_form, prepare_golden, read_golden),
        Reader("graph", onnx_form, prepare_graph, read_graph),
        Reader("document", json_form, prepare_document, read_any_document),
        Reader("config", toml_form, prepare_config, read_config),
        Reader("thresholds", toml_form, prepare_thresholds, read_thresholds),
        Reader("overrides", text_form, prepare_overrides, read_overrides),
        Reader("plan", json_form, prepare_plan, read_plan),
        Reader("report", json_form, prepare_report, read_one_report),
        Reader("page", json_form, prepare_report, read_page),
        Reader("summary", json_form, prepare_summary, read_summary),
        Reader("metrics", lines_form, prepare_metrics, read_metrics),
        Reader("stages", json_form, prepare_stages, read_stages),
        Reader("state", safetensors_form, prepare_state, read_adapt_state),
        Reader("facts", json_form, prepare_facts, read_run_facts, needs_torch=True),
        Reader("checkpoint", safetensors_form, prepare_checkpoint, read_checkpoint, needs_torch=True),
        Reader("weights", safetensors_form, prepare_weights, read_weights, needs_torch=True),
        Reader("address", text_form, prepare_address, read_address),
        Reader("image", None, prepare_image, read_one_image),
        Reader("npz", npz_form, prepare_npz, read_npz),
        Reader("idx", gzip_form, prepare_idx, read_idx),
    )
}
