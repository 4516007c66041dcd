"""What a board tells of itself: throttling, temperature, clock, memory, and power on a Raspberry Pi 5.

Source: Raspberry Pi documentation, `vcgencmd`; Linux `Documentation/admin-guide/pm/cpufreq.rst`.
"""

import threading
import time
from pathlib import Path

import psutil

from wasi_export.report import BoardRun, BoardSample
from wasi_export.runtimes.machine import POLICIES
from wasi_export.runtimes.processor import told
from wasi_export.runtimes.vcgencmd import ask, rail_watts, throttled_bits

THERMAL = Path("/sys/class/thermal/thermal_zone0/temp")


class Watch:
    """Samples a board about once a second, in a thread, from before a program starts until it ends."""

    def __init__(self, *, seconds: float = 1.0, idle_samples: int = 2) -> None:
        """Takes the samples of the board at rest."""
        self._begin, self._period = time.monotonic(), seconds
        self._samples: list[BoardSample] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        rest = []
        for _ in range(idle_samples):
            rest.append(take_sample(0.0))
            time.sleep(seconds / 2)
        now = time.monotonic()
        self._samples = [
            sample.model_copy(update={"seconds": -(now - self._begin) * (1 - index / len(rest))})
            for index, sample in enumerate(rest)
        ]
        self._begin = now
        self._thread.start()

    def end(self) -> BoardRun:
        """Returns what was seen, with a last sample of afterwards."""
        seconds = time.monotonic() - self._begin
        self._ended.set()
        self._thread.join()
        return BoardRun(
            governor=told(POLICIES / "policy0" / "scaling_governor").strip() or None,
            max_clock_mhz=_megahertz("scaling_max_freq"),
            seconds=seconds,
            samples=(*self._samples, take_sample(time.monotonic() - self._begin)),
        )

    def _run(self) -> None:
        while not self._ended.wait(self._period):
            self._samples.append(take_sample(time.monotonic() - self._begin))


def take_sample(seconds: float) -> BoardSample:
    """Returns what the board tells now."""
    celsius = told(THERMAL).strip()
    return BoardSample(
        seconds=seconds,
        throttled=throttled_bits(),
        celsius=int(celsius) / 1000 if celsius.lstrip("-").isdigit() else None,
        clock_mhz=_megahertz("scaling_cur_freq"),
        available_mb=psutil.virtual_memory().available // 10**6,
        watts=rail_watts(ask("pmic_read_adc")),
    )


def _megahertz(file: str) -> float | None:
    """Returns the highest clock of all processors, of a file that each has."""
    clocks = [told(policy / file).strip() for policy in POLICIES.glob("policy*")]
    return max((int(clock) / 1000 for clock in clocks if clock.isdigit()), default=None)
