import numpy as np
import pytest
from helpers import make_model

from wasi_export.errors import ModelFailedError
from wasi_export.runtimes.footprint import measure_footprint


def test_peak_memory_is_of_a_fresh_process(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(make_model())
    ballast = np.ones(500_000_000, np.uint8)  # raises this process far above what the child needs
    footprint = measure_footprint(path)
    assert (
        ballast.nbytes / 1e6 > footprint.peak_rss_mb > 20
    )  # Python, numpy and onnxruntime alone are above 20
    assert 0 < footprint.load_ms < 60_000


def test_memory_of_the_model_is_counted(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(make_model())
    small, large = (measure_footprint(path, batch=batch).peak_rss_mb for batch in (1, 500_000))
    assert large - small > 500_000 * 3 * 4 * 4 * 4 / 1e6 * 0.9  # the input alone, less what allocators hide


def test_a_model_that_does_not_load_fails_in_one_line(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a protobuf" * 9)
    with pytest.raises(ModelFailedError, match=r"in a fresh process failed: .*does not load") as caught:
        measure_footprint(path)
    assert "\n" not in str(caught.value)
