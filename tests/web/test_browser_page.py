"""The page of docs/browser in a headless Chromium that reaches nothing but its own server."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from helpers import make_bundle
from PIL import Image

from wasi_export.artifact import Bundle
from wasi_export.manifest import GOLDEN, MANIFEST, MODEL
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web" / "dist"
FACTS = ["Bundle", "Model", "Parameters", "Classes", "Input", "Parity error", "Runtime"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(open_page, tmp_path):
    """A folder with the page and its runtime, and the URL at which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "page").symlink_to(HERE.parents[1] / "docs" / "browser")
    (folder / "runtime").symlink_to(RUNTIME)
    handler = partial(QuietHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/page/?ort=/runtime"
        server.shutdown()
        thread.join()


@pytest.fixture
def image(tmp_path, rng):
    path = tmp_path / "image.png"
    Image.fromarray(rng.integers(100, 256, (40, 33, 3), np.uint8)).save(path)
    return path


def expected_classes(bundle, image):
    """Returns the classes and their probabilities as Python has them, the likeliest first."""
    manifest = bundle.manifest
    (logits,) = Session.open(bundle.model_path).run(Preprocess(manifest.input).batch([Image.open(image)]))
    shares = np.exp(logits) / np.exp(logits).sum()
    return [[manifest.classes[i], f"{100 * shares[i]:.1f} %"] for i in shares.argsort()[::-1]]


@pytest.mark.parametrize("way", ["served", "picked"])
def test_a_bundle_is_checked_and_an_image_is_what_python_says(open_page, served, bundle, image, way):
    folder, url = served
    if way == "served":
        (folder / "bundle").symlink_to(bundle)
        shown = open_page(f"{url}&bundle=/bundle", "", image)
    else:
        shown = open_page(url, bundle, image)
    assert (shown["error"], shown["faults"]) == (None, [])
    assert shown["classes"] == expected_classes(Bundle.open(bundle), image)
    assert list(shown["facts"]) == FACTS
    assert float(shown["facts"]["Parity error"].split(",")[0]) <= 1e-5


def refused(shown, message):
    """Asserts that the page says this and classifies nothing."""
    assert message in (shown["error"] or "")
    assert (shown["classes"], shown["faults"]) == ([], [])


@pytest.mark.parametrize("name", [MANIFEST, MODEL, GOLDEN])
def test_one_changed_byte_is_found(open_page, served, bundle, image, name):
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    refused(open_page(served[1], bundle, image), f"{name} has sha256")


def test_what_is_no_bundle_and_what_is_no_image_are_told(open_page, served, bundle, tmp_path):
    (tmp_path / "no-image.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.onnx").touch()
    refused(open_page(served[1], tmp_path / "empty"), "no manifest.json: give the folder")
    refused(open_page(served[1], bundle, tmp_path / "no-image.png"), "no-image.png is not an image")


def test_a_model_that_is_not_what_was_exported_classifies_nothing(open_page, served, image, tmp_path):
    wrong = make_bundle(tmp_path / "wrong", golden_error=1e-3)
    refused(open_page(served[1], wrong, image), "parity error 1.0e-3 is above")
    untested = make_bundle(tmp_path / "untested", golden_images=0)
    refused(open_page(served[1], untested, image), "the golden data holds no images")


def test_another_runtime_than_the_pinned_one_is_not_run(open_page, served, bundle, image):
    folder, url = served
    (folder / "other").mkdir()
    for name, more in (("ort.wasm.bundle.min.mjs", b"\n"), ("ort-wasm-simd-threaded.wasm", b"")):
        (folder / "other" / name).write_bytes((RUNTIME / name).read_bytes() + more)
    refused(open_page(url.replace("/runtime", "/other"), bundle, image), "is not of onnxruntime-web")
