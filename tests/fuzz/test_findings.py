"""What fuzzing found, each with the smallest input: now refused with a reason."""

import gzip
import io
import json
import struct
import zipfile

import pytest
from fuzz.readers import READERS
from helpers import SPEC, make_model
from PIL import Image

from wasi_export.errors import DataError, IntegrityError, MalformedError, WasiExportError
from wasi_export.runtimes.preprocess import Preprocess

pytestmark = pytest.mark.filterwarnings("ignore")
HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775808,)}"
MANY_DIGITS, DEEP = b"9" * 5000, b"[" * 3000


def image(kind: str, size: tuple[int, int] = (5, 5)) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", size).save(packed, kind)
    return packed.getvalue()


def npz(images: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", images)
    return packed.getvalue()


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def idx(*sizes: int) -> bytes:
    return bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)


FOUND = [
    ("config", b"seed = " + MANY_DIGITS, "is not TOML: Exceeds the limit"),
    ("config", b"seed = " + DEEP, "is not TOML: maximum recursion depth"),
    ("thresholds", b"max_size_mb = " + DEEP, "is not TOML"),
    ("overrides", b"seed=" + MANY_DIGITS, "seed: Unable to parse input string as an integer"),
    ("overrides", b"data.scale=" + DEEP, "data.scale: Input should be a valid tuple"),
    ("overrides", b"data.crop_pct=1e-320", "data.crop_pct: Input should be greater than or equal to 0.01"),
    ("stages", DEEP, "is not a list of stages"),
    ("document", b"1e999", "no number"),
    ("document", b"-" + b"9" * 400, "no number"),
    ("idx", b"\0\0\x08", "is not a whole IDX file"),
    ("idx", gzip.compress(b"\0\0\x08"), "is not a whole IDX file"),
    ("idx", idx(0, 2**32 - 1, 2**32 - 1), "is not a whole IDX file"),
    ("idx", idx(*[1] * 65) + b"\0", "is not a whole IDX file"),
    ("idx", idx(2, 2**32 - 1, 0), "is not a whole IDX file"),
    ("npz", npz(b"not an array"), "holds something else than arrays"),
    ("npz", npz(npy("{'descr': '|u1', 'shape': (3,")), "is not an .npz"),
    ("npz", npz(npy(HUGE)), "is not an .npz"),
    ("npz", npz(npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}")), "is not an .npz"),
    ("image", image("EPS"), "is not an image that can be read"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reader", "data", "message"), FOUND, ids=[f"{reader}-{message}" for reader, _, message in FOUND]
)
def test_an_input_is_refused(reader, data, message, tmp_path):
    READERS[reader].prepare(tmp_path)
    with pytest.raises(WasiExportError, match=message):
        READERS[reader].read(data, tmp_path)


@pytest.mark.parametrize(
    ("reader", "place", "value", "message"),
    [
        ("manifest", ["input", "mean"], [0.5, 0.5], "mean and std need 3 numbers"),
        ("manifest", ["input", "std"], [0.5, 0, 0.5], "std above 0"),
        ("manifest", ["input", "mean", 0], "nan", "should be a valid number"),
        ("manifest", ["input", "crop_pct"], 1e-9, "greater than or equal to 0.01"),
        ("manifest", ["metrics", "val_top1"], "Infinity", "should be a valid number"),
        ("plan", ["layers", 0, "rank"], -1, "greater than or equal to 1"),
        ("plan", ["layers", 2, "activation", "batch_count"], 0, "greater than or equal to 1"),
        ("report", ["host", "memory_mb"], 10**400, "no number"),
        ("report", ["checks", 0, "value"], float("nan"), "no number"),
    ],
)
def test_a_document_is_refused(reader, place, value, message, tmp_path):
    for seed in READERS[reader].prepare(tmp_path):
        document = part = json.loads(seed)
        *path, key = place
        for step in path:
            part = part[step]
        part[key] = value
        with pytest.raises(WasiExportError, match=message):
            READERS[reader].read(json.dumps(document).encode(), tmp_path)


def test_a_report_with_control_characters_makes_xml_that_can_be_read(tmp_path):
    document = json.loads(READERS["report"].prepare(tmp_path)[0])
    document["checks"][0]["name"] = "\x1b[31m \ufffe \x00"
    READERS["report"].read(json.dumps(document).encode(), tmp_path)


def test_an_optimiser_state_of_something_else_is_refused(tmp_path):
    """Of another parameter; of none; without the steps."""
    (seed,) = READERS["checkpoint"].prepare(tmp_path)
    for name, other in (
        (b"optimizer.1.exp_avg", b"optimizer.pe1.e_avg"),
        (b"optimizer.1.step", b"optimizer.1.stop"),
    ):
        assert name in seed
        with pytest.raises(IntegrityError, match="holds no state of this optimiser"):
            READERS["checkpoint"].read(seed.replace(name, other), tmp_path)


def test_a_graph_of_a_negative_opset_is_refused(tmp_path):
    with pytest.raises(MalformedError, match="no opset"):
        READERS["graph"].read(make_model(opset=-1), tmp_path)


def test_an_image_that_would_not_fit_in_memory_is_refused():
    """Of 200 bytes, and 224×13,440,000 pixels after it was resized."""
    spec = SPEC.model_copy(update={"height": 224, "width": 224})
    with pytest.raises(DataError, match="1×60000 pixels would have 224×13440000 before the crop"):
        Preprocess(spec)(Image.new("RGB", (1, 60_000)))
