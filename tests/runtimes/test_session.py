import numpy as np
import onnxruntime
import pytest
from helpers import SIZE, make_model, reference
from onnx import parser

from wasi_export.errors import HostError, ModelFailedError, UsageError
from wasi_export.runtimes.session import Session


@pytest.fixture
def write(tmp_path):
    def write_model(data: bytes):
        path = tmp_path / "model.onnx"
        path.write_bytes(data)
        return path

    return write_model


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_session_computes_the_model(write, optimise, batch):
    session = Session.open(write(make_model()), optimise=optimise)
    images = session.random_images(batch)
    assert session.input_shape == (None, 3, SIZE, SIZE)
    # float32 sums of 48 products against float64
    np.testing.assert_allclose(session.run(images), reference(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("newer", "named"), [({"opset": 99}, "opset 99"), ({"ir_version": 99}, "IR version 99")]
)
def test_a_model_newer_than_onnxruntime_names_both_versions(write, newer, named):
    path = write(make_model(**newer))
    with pytest.raises(HostError, match=rf"{named}, onnxruntime .* knows up to \d+: install") as caught:
        Session.open(path)
    assert onnxruntime.__version__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_operator_that_onnxruntime_lacks_is_named(write):
    path = write(make_model().replace(b"Flatten", b"Flattem"))
    with pytest.raises(HostError, match=r"needs operator Flattem of opset 23, which onnxruntime .* install"):
        Session.open(path)


def test_an_operator_that_onnxruntime_has_no_kernel_for_is_named(write):
    text = """<ir_version: 10, opset_import: ["" : 23]> g (float[B, 3, 4, 4] images) => (float[B, 3, 4, 4] y)
    { half = Cast <to = 16> (images) wave = Sin (half) y = Cast <to = 1> (wave) }"""  # 16 is bfloat16
    with pytest.raises(HostError, match=r"needs operator Sin of opset \d+, which onnxruntime .* install"):
        Session.open(write(parser.parse_model(text).SerializeToString()))


@pytest.mark.parametrize(
    "data", [b"", b"not a protobuf" * 9, make_model()[:-40]], ids=["empty", "text", "cut"]
)
def test_a_broken_model_fails_in_one_line(write, data):
    with pytest.raises(ModelFailedError, match=r"model\.onnx does not load in onnxruntime") as caught:
        Session.open(write(data))
    assert "\n" not in str(caught.value)


def test_a_missing_model_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"no model file .*nothing\.onnx"):
        Session.open(tmp_path / "nothing.onnx")


def test_images_of_another_size_fail_in_one_line(write):
    session = Session.open(write(make_model()))
    with pytest.raises(
        ModelFailedError, match=r"failed on images \[1, 3, 5, 5\].*Got: 5 Expected: 4"
    ) as caught:
        session.run(np.zeros((1, 3, 5, 5), np.float32))
    assert "\n" not in str(caught.value)


def test_a_fixed_batch_size_refuses_another(write):
    session = Session.open(write(make_model(batch="1")))
    assert session.random_images(1).shape == (1, 3, SIZE, SIZE)
    with pytest.raises(UsageError, match="takes batch 1 only, got batch 2"):
        session.random_images(2)
