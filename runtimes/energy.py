"""The energy that a machine took, from the meter in its processor: RAPL, as Linux shows it on Intel and AMD.

It counts the processor packages and, where there is a counter for it, memory: of all processes, and nothing
of the rest of the board. A Raspberry Pi 5 has no such counter. Its power chip tells currents of the moment
(`vcgencmd pmic_read_adc`), and to ask for them between two steps would miss what the steps take.

Source: Linux `Documentation/power/powercap/powercap.rst`.
"""

from collections.abc import Sequence
from pathlib import Path

from wasi_export.errors import HostError

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts from when it was made. The counters go round, at a value that they tell."""

    def __init__(self, domains: Sequence[Path]) -> None:
        """Begins to count; a domain is a folder with `energy_uj` and `max_energy_range_uj`."""
        self._ranges = {domain: _number(domain / "max_energy_range_uj") for domain in domains}
        self._last = {domain: _number(domain / "energy_uj") for domain in domains}
        self._microjoules = 0

    def joules(self) -> float:
        """Returns what was taken so far; to be asked once a round at least, which takes many minutes.

        Raises:
            HostError: a counter cannot be read any more.
        """
        for domain, last in self._last.items():
            try:
                now = _number(domain / "energy_uj")
            except (OSError, ValueError) as error:
                raise HostError(
                    f"the energy meter cannot be read any more ({error}): leave out --max-joules"
                ) from error
            self._microjoules += now - last if now >= last else now - last + self._ranges[domain]
            self._last[domain] = now
        return self._microjoules / 1e6


def open_meter(powercap: Path = POWERCAP) -> EnergyMeter:
    """Returns the meter of this machine.

    Raises:
        HostError: it has none, or none that may be read.
    """
    domains = [path for path in sorted(powercap.glob("intel-rapl:*")) if _is_counted(path)]
    if not domains:
        raise HostError(
            f"this machine has no energy meter (no {powercap}/intel-rapl:*), --max-joules cannot be kept: "
            "leave it out, or give --max-seconds"
        )
    try:
        return EnergyMeter(domains)
    except (OSError, ValueError) as error:
        raise HostError(
            f"the energy meter cannot be read ({error}): let this user read it, or leave out --max-joules"
        ) from error


def _is_counted(domain: Path) -> bool:
    """Returns whether this is a package or memory; `core` and `psys` count what others count too."""
    name = domain / "name"
    return name.is_file() and name.read_text().startswith(("package", "dram"))


def _number(path: Path) -> int:
    return int(path.read_text())
