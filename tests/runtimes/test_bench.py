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
    assert first.ratio_interval == (1, 1)
    low, high = second.ratio_interval
    assert low <= second.ratio_to_first <= high
    assert first.noise_floor == second.noise_floor >= 0


def test_several_threads_are_timed_by_the_wall(model):
    (latency,) = measure_latency([("a", model)], threads=2, rounds=3, warmup=0)
    assert (latency.threads, latency.clock) == (2, "wall")
    assert (latency.ratio_interval, latency.noise_floor) == (None, None)  # 3 rounds, one model


@pytest.mark.parametrize(("enough", "rounds"), [(8, 8), (9, 16), (10**6, 32)])
def test_rounds_are_doubled_until_they_decide_or_are_four_times_as_many(model, enough, rounds):
    seen = []

    def decided(found):
        seen.append(len(found[0].samples_ms))
        return seen[-1] >= enough

    found = measure_latency([("a", model), ("b", model)], rounds=8, warmup=1, decided=decided)
    assert {len(latency.samples_ms) for latency in found} == {rounds}
    assert seen[-1] == min(rounds, 16) or rounds == 32


def test_an_interval_that_is_looked_at_again_is_wider(model):
    """Of 30 rounds it is from the 10th to the 21st ratio; where looks share the error, 9th to 22nd."""
    models = [("a", model), ("b", model)]
    for decided, rank in ((None, 10), (lambda found: True, 9)):
        first, second = measure_latency(models, rounds=30, decided=decided)
        ratios = np.sort(np.array(second.samples_ms) / np.array(first.samples_ms))
        assert second.ratio_interval == (ratios[rank - 1], ratios[30 - rank])


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
