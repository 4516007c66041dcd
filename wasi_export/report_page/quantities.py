"""Numbers with their units, as the page prints them. A space between the two never breaks."""

import math

SPACE = "\u00a0"
MINUS = "\u2212"


def percent(share: float, digits: int = 2) -> str:
    """Returns a share of 1 in percent."""
    return f"{100 * share:.{digits}f}{SPACE}%"


def points(difference: float) -> str:
    """Returns a difference of two shares in percentage points, with its sign."""
    number = f"{abs(100 * difference):.2f}"
    sign = "±" if float(number) == 0 else "+" if difference > 0 else MINUS
    return f"{sign}{number}"


def milliseconds(ms: float) -> str:
    """Returns a time without its unit, as fine as a reader needs it."""
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:,.0f}"


def megabytes(mb: float) -> str:
    """Returns a size of 10^6 bytes each without its unit."""
    return f"{mb:.2f}" if mb < 100 else f"{mb:,.0f}"


def millions(count: float) -> str:
    """Returns a count in millions."""
    return f"{count / 1e6:.2f}{SPACE}M" if count < 100e6 else f"{count / 1e6:,.0f}{SPACE}M"


def shorten(text: str, length: int = 28) -> str:
    """Returns a name that has room in a chart."""
    return text if len(text) <= length else text[: length - 1] + "…"


def plain(value: float, step: float) -> str:
    """Returns the label of a tick, with the digits that its step needs."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}".replace("-", MINUS)
