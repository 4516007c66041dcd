"""How much of a board a training may take: time, memory, energy, heat."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from wasi_export.errors import HostError
from wasi_export.runtimes.energy import EnergyMeter, open_meter

COOL_DOWN_CELSIUS, COOL_DOWN_SECONDS = 5.0, 0.5
PROCESSOR_SENSORS = ("cpu_thermal", "cpu-thermal", "soc_thermal", "coretemp", "k10temp", "zenpower")
"""As Linux names them: Raspberry Pi and other ARM boards, then Intel, then AMD."""


def _never() -> bool:
    return False


@dataclass
class Budget:
    """Asked after every step. A limit that this machine cannot measure is refused when it is made."""

    max_seconds: float | None = None
    max_rss_mb: float | None = None
    max_celsius: float | None = None
    """Above it the training pauses, until it is 5 degrees below."""
    max_joules: float | None = None
    meter: EnergyMeter | None = None
    """Of `max_joules`; None: that of this machine."""
    _start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Looks for the sensors that the limits need.

        Raises:
            HostError: there are none.
        """
        if self.max_celsius is not None and celsius() is None:
            raise HostError(
                f"this machine tells no temperature, --max-celsius {self.max_celsius:g} cannot be kept: "
                "leave it out, or limit the work with --nice, --threads or --max-seconds"
            )
        if self.max_joules is not None and self.meter is None:
            self.meter = open_meter()

    def is_spent(self, is_stopped: Callable[[], bool] = _never) -> bool:
        """Returns whether time or energy are over; pauses where it is too hot, until it is stopped.

        Raises:
            HostError: the process takes more memory than it may, or a meter failed.
        """
        rss_mb = psutil.Process().memory_info().rss / 1e6
        if self.max_rss_mb is not None and rss_mb > self.max_rss_mb:
            raise HostError(
                f"the process takes {rss_mb:.0f} MB, --max-rss-mb allows {self.max_rss_mb:g}: the last step "
                "is saved, go on with a smaller --batch-size"
            )
        if self._is_hotter_than(0.0):
            while self._is_hotter_than(-COOL_DOWN_CELSIUS) and not (self._is_over() or is_stopped()):
                time.sleep(COOL_DOWN_SECONDS)
        return self._is_over()

    def _is_over(self) -> bool:
        if self.max_joules is not None and self.meter is not None and self.meter.joules() > self.max_joules:
            return True
        return self.max_seconds is not None and time.monotonic() - self._start > self.max_seconds

    def _is_hotter_than(self, more: float) -> bool:
        return self.max_celsius is not None and (celsius() or 0.0) > self.max_celsius + more


def celsius() -> float | None:
    """Returns the highest temperature of the processor, or of what there is; None where nothing is told."""
    sensors: dict[str, list[Any]] = getattr(psutil, "sensors_temperatures", dict)()
    of_processor = {name: sensors[name] for name in PROCESSOR_SENSORS if name in sensors} or sensors
    return max((reading.current for readings in of_processor.values() for reading in readings), default=None)
