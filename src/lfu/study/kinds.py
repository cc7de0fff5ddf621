"""Kinds of metric: how a value and a difference are shown, and what counts as better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of metric.

    Attributes:
        unit: of the value as shown.
        places: decimals that it is shown with.
        shown: value -> the number that is shown.
        change: difference of two values -> the number that is shown for it.
        change_unit, change_places: of that.
    """

    unit: str
    places: int
    shown: Callable[[float], float]
    change: Callable[[float], float]
    change_unit: str
    change_places: int


KINDS = {
    "nll": Kind("nats per token", 3, lambda v: v, lambda d: d, "nats per token", 3),
    "share": Kind("%", 1, lambda v: 100 * v, lambda d: 100 * d, "points", 1),
    "text": Kind("perplexity", 2, math.exp, lambda d: 100 * math.expm1(d), "%", 1),
    "cosine": Kind("cosine", 4, lambda v: v, lambda d: d, "cosine", 4),
}


def turn(metric: Mapping[str, Any], interval: Mapping[str, Any]) -> int:
    """+1: better beyond the noise, -1: worse, 0: neither, or by less than is shown.

    Args:
        metric: its `kind`, and `sign`: +1 if more is better, -1 if less is.
        interval: `value`, `low` and `high` of a difference.
    """
    kind = KINDS[metric["kind"]]
    seen = round(kind.change(interval["value"]), kind.change_places) != 0
    beyond = int(interval["low"] > 0) - int(interval["high"] < 0)
    return metric["sign"] * beyond if seen else 0
