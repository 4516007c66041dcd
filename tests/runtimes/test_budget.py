import psutil
import pytest

from wasi_export.errors import HostError
from wasi_export.runtimes.budget import Budget, celsius


def test_time_is_over_after_it():
    assert not Budget().is_spent()
    assert not Budget(max_seconds=60).is_spent()
    assert Budget(max_seconds=0).is_spent()


def test_more_memory_than_allowed_says_how_much_it_is():
    used = psutil.Process().memory_info().rss / 1e6
    Budget(max_rss_mb=2 * used + 100).is_spent()
    with pytest.raises(HostError, match=r"takes \d+ MB, --max-rss allows 1: .* --batch-size"):
        Budget(max_rss_mb=1).is_spent()


def test_a_processor_that_is_hot_ends_with_the_time_at_the_latest(monkeypatch):
    class Reading:
        current = 90.0

    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: {"cpu": [Reading()]}, raising=False)
    assert celsius() == 90.0
    assert Budget(max_celsius=80, max_seconds=0).is_spent()
    assert not Budget(max_celsius=95).is_spent()


def test_a_system_without_sensors_has_no_temperature(monkeypatch):
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    assert celsius() is None
    assert not Budget(max_celsius=1).is_spent()
