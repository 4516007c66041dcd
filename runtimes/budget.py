"""How much of a board a training may take: time, memory, heat."""

import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from wasi_export.errors import HostError

COOL_DOWN_CELSIUS, COOL_DOWN_SECONDS = 5.0, 2.0


@dataclass
class Budget:
    """Asked after every step."""

    max_seconds: float | None = None
    max_rss_mb: float | None = None
    max_celsius: float | None = None
    """Above it the training pauses, until it is 5 degrees below."""
    _start: float = field(default_factory=time.monotonic)

    def is_spent(self) -> bool:
        """Returns whether the time is over; pauses where it is too hot.

        Raises:
            HostError: the process takes more memory than it may.
        """
        rss_mb = psutil.Process().memory_info().rss / 1e6
        if self.max_rss_mb is not None and rss_mb > self.max_rss_mb:
            raise HostError(
                f"the process takes {rss_mb:.0f} MB, --max-rss allows {self.max_rss_mb:g}: the last step is "
                "saved, go on with a smaller --batch-size"
            )
        if self.max_celsius is not None and (celsius() or 0.0) > self.max_celsius:
            while (celsius() or 0.0) > self.max_celsius - COOL_DOWN_CELSIUS and not self._is_over():
                time.sleep(COOL_DOWN_SECONDS)
        return self._is_over()

    def _is_over(self) -> bool:
        return self.max_seconds is not None and time.monotonic() - self._start > self.max_seconds


def celsius() -> float | None:
    """Returns the highest temperature that the system tells of its processor; None where it tells none."""
    sensors: dict[str, list[Any]] = getattr(psutil, "sensors_temperatures", dict)()
    return max((reading.current for readings in sensors.values() for reading in readings), default=None)
