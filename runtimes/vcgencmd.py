"""What the firmware of a Raspberry Pi answers. Nothing here imports onnxruntime.

Source: Raspberry Pi documentation, `vcgencmd`.
"""

import re
import subprocess

_RAIL = re.compile(r"^\s*(\w+)_([AV]) \w+\(\d+\)=([0-9.]+)[AV]$", re.MULTILINE)


def ask(question: str) -> str:
    """Returns what `vcgencmd` answers; empty where there is none, or it does not answer."""
    try:
        answer = subprocess.run(
            ["vcgencmd", question], capture_output=True, text=True, check=False, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout


def throttled_bits() -> int | None:
    """Returns the bits of `get_throttled`; None where there is no firmware to ask."""
    found = re.fullmatch(r"throttled=0x([0-9a-fA-F]+)", ask("get_throttled").strip())
    return int(found[1], 16) if found else None


def rail_watts(answer: str) -> float | None:
    """Returns the power over the rails for which `pmic_read_adc` answers current and voltage; None: none.

    That is less than what the board takes: it is without losses, and without rails that have no current.
    """
    values = {(name, kind): float(value) for name, kind, value in _RAIL.findall(answer)}
    rails = [
        (values[name, "A"], values[name, "V"])
        for name, kind in values
        if kind == "A" and (name, "V") in values
    ]
    return sum(current * voltage for current, voltage in rails) if rails else None
