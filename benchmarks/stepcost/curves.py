"""Curves: the cases along one axis, with their slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lfu.errors import did_you_mean
from stepcost.cases import AXES, SIZES, Case
from stepcost.fits import exponent, per_doubling


def parse_curve(text: str) -> tuple[str, list[Any]]:
    """`length=64,128` -> the axis and its values, in order.

    Raises:
        ValueError: an unknown axis or size, no values, or one that is no number.
    """
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


def cases_of(base: Sequence[Case], curves: Sequence[tuple[str, list[Any]]]) -> list[Case]:
    """The base cases, then those along each curve, each once."""
    along = [case.along(axis, value) for axis, values in curves for case in base for value in values]
    return list(dict.fromkeys([*base, *along]))


def curve(result: dict[str, Any], axis: str) -> dict[str, Any]:
    """The measured cases that differ from the first of their theta on `axis` alone, and the slopes along it.

    Returns:
        theta -> `x` (for `size`: parameters), `seconds`, `ratio` (variant -> list), `exponent` of the seconds,
        `per_doubling` of the ratio. Only thetas with two points or more.
    """
    found: dict[str, Any] = {}
    measured = [one for one in result["cases"] if "seconds" in one]
    for theta in dict.fromkeys(one["case"]["theta"] for one in measured):
        same = [one for one in measured if one["case"]["theta"] == theta]
        rest = lambda one: {k: v for k, v in one["case"].items() if k != axis}
        points = sorted((one for one in same if rest(one) == rest(same[0])), key=lambda one: _x(one, axis))
        if len(points) < 2:
            continue
        names = [name for name in points[0]["seconds"] if all(name in one["seconds"] for one in points)]
        xs = [_x(one, axis) for one in points]
        seconds = {name: [one["seconds"][name] for one in points] for name in names}
        ratio = {name: [one["ratio"][name] for one in points] for name in names}
        found[theta] = {
            "x": xs,
            "seconds": seconds,
            "ratio": ratio,
            "floor_padded": [one["floor"]["floor_padded"] for one in points],
            "exponent": {name: exponent(xs, ys) for name, ys in seconds.items()},
            "per_doubling": {name: per_doubling(xs, ys) for name, ys in ratio.items()},
        }
    return found


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
