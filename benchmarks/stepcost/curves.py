"""Curves: the cases along one axis, with their slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lfu.support.errors import did_you_mean
from stepcost.cases import AXES, SIZES, Case
from stepcost.fits import exponent, per_doubling


@dataclass(frozen=True)
class Curve:
    """The values along one axis, and what else differs from the base case on all of them, as `size=30m,70m@batch=1`."""

    axis: str
    values: list[Any]
    at: dict[str, Any] = field(default_factory=dict)

    def cases(self, base: Case) -> list[Case]:
        """Empty where the axis means nothing: the rank of a theta that is no LoRA."""
        if self.axis == "rank" and base.theta != "lora":
            return []
        return [replace(base, **self.at, **{self.axis: value}) for value in self.values]


def parse_curve(text: str) -> Curve:
    """`length=64,128`, or `size=30m,70m@batch=1` for another base; values in order.

    Raises:
        ValueError: an unknown axis or size, no values, or one that is no number.
    """
    first, *others = text.split("@")
    axis, values = _parse_axis(first)
    at = {}
    for name, found in map(_parse_axis, others):
        if len(found) > 1 or name == axis:
            raise ValueError(f"{text!r}: give one value, of another axis, behind @, as in size=30m,70m@batch=1")
        at[name] = found[0]
    return Curve(axis, values, at)


def _parse_axis(text: str) -> tuple[str, list[Any]]:
    axis, _, rest = text.partition("=")
    if axis not in AXES:
        raise ValueError(f"unknown axis {axis!r}: use one of {', '.join(AXES)}.{did_you_mean(axis, AXES)}")
    try:
        values = [AXES[axis](value.strip()) for value in rest.split(",") if value.strip()]
    except ValueError:
        raise ValueError(f"{text!r}: {axis} takes whole numbers, as in {axis}=1,2,4") from None
    wrong = [value for value in values if (value not in SIZES if axis == "size" else value < 1)]
    if wrong:
        raise ValueError(f"{text!r}: no such {axis}: {wrong[0]}{did_you_mean(str(wrong[0]), SIZES)}")
    if not values:
        raise ValueError(f"{text!r}: give values, as in length=64,128,256")
    return axis, values


def cases_of(base: Sequence[Case], curves: Sequence[Curve]) -> list[Case]:
    """The base cases, then those along each curve, each once."""
    return list(dict.fromkeys([*base, *(one for curve in curves for case in base for one in curve.cases(case))]))


def curve(result: dict[str, Any], axis: str) -> dict[str, Any]:
    """The most measured cases of a theta that differ on `axis` alone (the first such, of several), and their slopes.

    Returns:
        theta -> `at` (what they share: the values of the other axes), `x` (for `size`: parameters), `seconds`, `ratio`
        and `memory` over SFT's (variant -> list), `exponent` of the seconds, `per_doubling` of the ratio.
        Only thetas with two points or more.
    """
    found: dict[str, Any] = {}
    measured = [one for one in result["cases"] if "seconds" in one]
    for theta in dict.fromkeys(one["case"]["theta"] for one in measured):
        same = [one for one in measured if one["case"]["theta"] == theta]
        rest = lambda one: {k: v for k, v in one["case"].items() if k != axis}
        alike = [[one for one in same if rest(one) == rest(first)] for first in same]
        most: list[dict[str, Any]] = max(alike, key=len)
        points = sorted(most, key=lambda one: _x(one, axis))
        if len(points) < 2:
            continue
        names = [name for name in points[0]["seconds"] if all(name in one["seconds"] for one in points)]
        xs = [_x(one, axis) for one in points]
        seconds = {name: [one["seconds"][name] for one in points] for name in names}
        ratio = {name: [one["ratio"][name] for one in points] for name in names}
        found[theta] = {
            "at": {name: points[0]["case"][name] for name in AXES if name != axis},
            "x": xs,
            "seconds": seconds,
            "ratio": ratio,
            "floor_padded": [one["floor"]["floor_padded"] for one in points],
            "memory": _memory_ratios(points),
            "exponent": {name: exponent(xs, ys) for name, ys in seconds.items()},
            "per_doubling": {name: per_doubling(xs, ys) for name, ys in ratio.items()},
        }
    return found


def _memory_ratios(points: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Variant -> peak memory over SFT's at each point; empty where a point has none."""
    found = [one.get("memory_mb", {}) for one in points]
    names = [name for name in found[0] if all(name in one and "sft" in one for one in found)]
    return {name: [one[name]["total"] / one["sft"]["total"] for one in found] for name in names}


def _x(one: dict[str, Any], axis: str) -> float:
    if axis == "size":
        return one["floor"]["parameters"]
    value = one["case"][axis]
    return SIZES[one["case"]["size"]]["num_hidden_layers"] if axis == "layers" and value is None else value


def first_cases(thetas: Sequence[str], base: Case) -> list[Case]:
    """The base case for each theta."""
    return [Case(**asdict(base) | {"theta": theta}) for theta in thetas]


def is_number(value: float) -> bool:
    """Not nan."""
    return not math.isnan(value)
