"""Slopes: how cost grows along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """p of the least-squares fit `y = c x^p`; nan for fewer than two different xs.

    Raises:
        ValueError: something is not > 0.
    """
    if any(value <= 0 for value in (*xs, *ys)):
        raise ValueError("a power law needs values > 0")
    return _slope([math.log(x) for x in xs], [math.log(y) for y in ys])


def per_doubling(xs: Sequence[float], ys: Sequence[float]) -> float:
    """By how much y grows each time x doubles: the slope of `y = a + b log2 x`; nan for fewer than two xs.

    Raises:
        ValueError: an x is not > 0.
    """
    if any(x <= 0 for x in xs):
        raise ValueError("a doubling needs values > 0")
    return _slope([math.log2(x) for x in xs], ys)


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    if len(set(xs)) < 2:
        return math.nan
    return float(np.polyfit(xs, ys, 1)[0])
