import psutil
import pytest

from wasi_export.errors import HostError
from wasi_export.runtimes import budget
from wasi_export.runtimes.budget import Budget, celsius


def test_time_is_over_after_it():
    assert not Budget().is_spent()
    assert not Budget(max_seconds=60).is_spent()
    assert Budget(max_seconds=0).is_spent()


def test_more_memory_than_allowed_says_how_much_it_is():
    used = psutil.Process().memory_info().rss / 1e6
    Budget(max_rss_mb=2 * used + 100).is_spent()
    with pytest.raises(HostError, match=r"takes \d+ MB, --max-rss-mb allows 1: .* --batch-size"):
        Budget(max_rss_mb=1).is_spent()


class Reading:
    def __init__(self, current):
        self.current = current


def sensors(monkeypatch, **found):
    readings = {name: [Reading(value) for value in values] for name, values in found.items()}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: readings, raising=False)


def test_a_processor_that_is_hot_ends_with_the_time_at_the_latest(monkeypatch):
    sensors(monkeypatch, cpu_thermal=[90.0])
    assert Budget(max_celsius=80, max_seconds=0).is_spent()
    assert not Budget(max_celsius=95).is_spent()


def test_a_pause_of_a_hot_processor_ends_when_the_training_is_stopped(monkeypatch):
    sensors(monkeypatch, cpu_thermal=[90.0])
    assert not Budget(max_celsius=80).is_spent(lambda: True)


def test_a_pause_ends_when_it_is_five_degrees_cooler(monkeypatch):
    seen = iter((60.0, 81.0, 81.0, 76.0, 74.9))  # the first one is asked for when the limit is set
    monkeypatch.setattr(
        psutil, "sensors_temperatures", lambda: {"cpu_thermal": [Reading(next(seen))]}, raising=False
    )
    monkeypatch.setattr(budget, "COOL_DOWN_SECONDS", 0.0)
    assert not Budget(max_celsius=80).is_spent()
    assert next(seen, None) is None


def test_the_temperature_is_that_of_the_hottest_core_and_not_of_a_disk(monkeypatch):
    sensors(monkeypatch, nvme=[85.0], coretemp=[50.0, 61.0])
    assert celsius() == 61.0
    sensors(monkeypatch, some_board=[40.0])
    assert celsius() == 40.0


def test_a_limit_of_heat_is_refused_by_a_system_without_sensors(monkeypatch):
    sensors(monkeypatch)
    assert celsius() is None
    with pytest.raises(HostError, match="tells no temperature, --max-celsius 70 cannot be kept: leave it"):
        Budget(max_celsius=70)
