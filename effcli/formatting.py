"""SI numbers to text. Every renderer formats through here, so that a figure reads the same everywhere.

Units are decimal (1 MB is 10^6 bytes). ``None`` becomes an em dash; the reason stands beside it in the report.
"""

from __future__ import annotations

import math

MISSING = "—"

_LARGE = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def significant(value: float | None, digits: int = 3) -> str:
    """Return ``value`` with at least ``digits`` significant digits, thousands separated: ``0.990``, ``1,215``."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    magnitude = math.floor(math.log10(abs(value)))
    magnitude = math.floor(math.log10(abs(round(value, digits - 1 - magnitude))))  # rounding 9.996 adds a digit
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def short(value: float | None, digits: int = 3) -> str:
    """Return ``value`` rounded to ``digits`` significant digits without trailing zeros, for prose: ``11,700``."""
    if value is None or value == 0:
        return significant(value, digits)
    rounded = round(value, digits - 1 - math.floor(math.log10(abs(value))))
    text = significant(rounded, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _scaled(value: float | None, unit: str, scales: tuple[tuple[float, str], ...], digits: int = 3) -> str:
    if value is None:
        return MISSING
    for size, prefix in scales:
        # A value that rounds up to the next prefix takes it: 999.7 MB is 1.00 GB.
        if abs(value) >= size * (1 - 0.5 * 10**-digits):
            return f"{significant(value / size, digits)} {prefix}{unit}"
    if value == 0:
        return f"0 {unit}"
    size, prefix = scales[-1]
    return f"{significant(value / size, digits)} {prefix}{unit}"


def large(value: float | None, unit: str, digits: int = 3) -> str:
    """Return a quantity of 1 or more with a decimal prefix: ``5.40 GB/s``."""
    if value is not None and abs(value) < 1e3 * (1 - 0.5 * 10**-digits):
        number = f"{value:,.0f}" if float(value).is_integer() else significant(value, digits)
        return f"{number} {unit}"
    return _scaled(value, unit, _LARGE, digits)


def data_size(value: float | None) -> str:
    """Format bytes: ``269 MB``."""
    return large(value, "B")


def flops(value: float | None) -> str:
    """Format an amount of work: ``68.7 GFLOP``."""
    return large(value, "FLOP")


def flop_rate(value: float | None) -> str:
    """Format a rate of work: ``1.20 TFLOP/s``."""
    return large(value, "FLOP/s")


def bandwidth(value: float | None) -> str:
    """Format bytes per second: ``19.2 GB/s``."""
    return large(value, "B/s")


def hertz(value: float | None) -> str:
    """Format a clock: ``1.41 GHz``."""
    return large(value, "Hz")


def seconds(value: float | None) -> str:
    """Format a time: ``37.5 ms``."""
    return _scaled(value, "s", _SMALL)


def duration(value: float | None) -> str:
    """Format a time that people wait for: ``8.40 s``, ``3 min 20 s``, ``2 h 05 min``, ``1 d 4 h``."""
    if value is None or value < 99.5:
        return seconds(value)
    whole = round(value)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min {whole % 60:02} s"


def percent(value: float | None) -> str:
    """Format a fraction: ``28 %``; below 10 % with one decimal, and never 0 unless it is."""
    if value is None:
        return MISSING
    hundred = 100 * value
    if 0 < hundred < 0.05:
        return "<0.1 %"
    return f"{hundred:.1f} %" if abs(hundred) < 9.95 and round(hundred, 1) % 1 else f"{hundred:,.0f} %"


def integer(value: float | None) -> str:
    """Format a count: ``11,676``."""
    return MISSING if value is None else f"{value:,.0f}"


def parameters(value: float | None) -> str:
    """Format a number of parameters: ``135 M``, ``405 B``."""
    if value is None:
        return MISSING
    return large(value, "").replace(" G", " B").strip()


def yes_no(value: bool | None) -> str:
    """Format a flag."""
    return MISSING if value is None else ("yes" if value else "no")


def printable(text: object) -> str:
    """Return one line of text without control characters (a name may carry terminal escapes)."""
    return "".join(character if character.isprintable() else " " for character in str(text)).strip()
