"""Numbers and metrics in words."""

from __future__ import annotations

import math

NONE, MINUS = "\u2013", "\u2212"
"""A dash for a number that is not there, and the sign of a negative one."""

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

BETTER = {"lower": "lower is better", "higher": "higher is better", "": ""}


def short(value: float, digits: int = 3) -> str:
    """A number for people: three significant digits, without an exponent where it is readable."""
    if not math.isfinite(value):
        return NONE if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.replace("-", MINUS)


def count(value: float, noun: str) -> str:
    """ "1 call", "35 calls", "76,800 images"."""
    return f"{value:,.0f} {noun}{'' if value == 1 else 's'}"


def compact(value: float, _position: object = None) -> str:
    """Tick labels: 0.0005, 0.01, 300, 10k, 2M; 2·10⁻⁷ where zeros could not be counted."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:g}{unit}".replace("-", MINUS)
    if 0 < size < 1e-5:
        digits, power = f"{value:.1e}".split("e")
        digits = digits.removesuffix(".0").replace("-", MINUS)
        raised = f"10{str(int(power)).translate(RAISED)}"
        return raised if digits == "1" else f"{digits}·{raised}"
    if 0 < size < 1e-3:
        return f"{value:.7f}".rstrip("0").replace("-", MINUS)
    return f"{value:g}".replace("-", MINUS)


def about(value: float) -> str:
    """Three significant digits, compactly: 661k, 289k."""
    return compact(float(f"{value:.3g}"))


def duration(seconds: float) -> str:
    """ "34 s", "2 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
