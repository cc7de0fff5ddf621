"""Numbers and lists as reports write them."""

from collections.abc import Mapping
from typing import Any

from lfu.support.words import and_ as and_


def number(value: float, form: str = ".1f") -> str:
    """The number as text; one that rounds to zero has no sign."""
    text = format(value, form)
    return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


def estimate(interval: Mapping[str, Any], form: str = ".1f", scale: float = 1.0) -> str:
    """`12.3 [10.1, 14.0]`: value and interval, times `scale`."""
    value, low, high = (number(scale * interval[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def sign(interval: Mapping[str, Any], form: str = "", scale: float = 1.0) -> int:
    """+1 or -1 where the whole interval lies above or below zero, else 0.

    With the `form` and `scale` in which `estimate` shows it, 0 also where a reader would see a zero.
    """
    if form and float(number(scale * interval["value"], form)) == 0:
        return 0
    return int(interval["low"] > 0) - int(interval["high"] < 0)


def p_value(p: float) -> str:
    """`p = 0.012`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def shorter(label: str, most: int = 26) -> str:
    """A label that leaves room for the picture."""
    return label if len(label) <= most else label[: most - 1] + "…"


def told(found: Mapping[str, str]) -> str:
    """`label: text; label: text`."""
    return "; ".join(f"{label}: {text}" for label, text in found.items())


def by_chance(intervals: int, few: int = 4) -> str:
    """A sentence on how many of so many 95 % intervals leave out the truth; nothing for a few of them."""
    about = format(intervals / 20, ".1g" if intervals < 190 else ".0f")  # as 1e+01 in one digit
    said = f" Of {intervals} such intervals about {about} leave out the truth by chance."
    return said if intervals > few else ""
