import numpy as np
import pytest
from helpers import make_model

from wasi_export.errors import UsageError
from wasi_export.runtimes.bench import measure_latency


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(make_model())
    return path


def test_figures_follow_from_the_samples(model):
    first, second = measure_latency([("a", model), ("b", model)], batch=2, rounds=21, warmup=2)
    assert (first.model, second.model) == ("a", "b")
    for latency in (first, second):
        samples = np.array(latency.samples_ms)
        assert (latency.batch, latency.threads, latency.clock, len(samples)) == (2, 1, "cpu", 21)
        assert (samples > 0).all()
        figures = (latency.p50_ms, latency.p90_ms, latency.p99_ms)
        np.testing.assert_allclose(figures, np.percentile(samples, [50, 90, 99]))
        ratios = samples / np.array(first.samples_ms)
        figures = (latency.ratio_low, latency.ratio_to_first, latency.ratio_high)
        np.testing.assert_allclose(figures, np.percentile(ratios, [25, 50, 75]))
    assert first.ratio_low == first.ratio_high == 1


def test_several_threads_are_timed_by_the_wall(model):
    (latency,) = measure_latency([("a", model)], threads=2, rounds=3, warmup=0)
    assert (latency.threads, latency.clock) == (2, "wall")


def test_progress_covers_warmup_and_rounds(model):
    seen = []

    def track(items, label, total):
        for item in items:
            seen.append((label, total))
            yield item

    measure_latency([("a", model)], rounds=3, warmup=2, track=track)
    assert seen == [("latency", 5)] * 5


def test_a_batch_that_a_model_does_not_take_is_refused(tmp_path):
    path = tmp_path / "fixed.onnx"
    path.write_bytes(make_model(batch="1"))
    with pytest.raises(UsageError, match="takes batch 1 only, got batch 2"):
        measure_latency([("fixed", path)], batch=2, rounds=1, warmup=0)
