"""How far a setting is ahead of all that plain SFT reaches, on three axes at once, with an interval over bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.stats import t as student

AXES = ("target", "reworded", "others")


class Estimate(NamedTuple):
    """A value with the half-width of its 95 % interval over base models; NaN where SFT doesn't reach so far.

    A half-width alone is NaN at the edge: without some base, SFT doesn't reach so far.
    """

    value: float
    half: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "beyond SFT"
        return f"{self.value:+.1f}, edge of SFT" if np.isnan(self.half) else f"{self.value:+.1f} ± {self.half:.1f}"


def lead(point: np.ndarray, surface: np.ndarray) -> float:
    """By how much all three axes must be lowered before a mixture of SFT's settings does as well; below 0: behind.

    Args:
        point: `(3,)`, per cent.
        surface: `(n, 3)`, what SFT's settings reach.
    """
    count = len(surface)
    # minimise delta with w @ surface + delta >= point, w >= 0, sum w = 1
    found = linprog(
        [*[0.0] * count, 1.0],
        A_ub=-np.column_stack([surface.T, np.ones(3)]),
        b_ub=-point,
        A_eq=[[*[1.0] * count, 0.0]],
        b_eq=[1.0],
        bounds=[*[(0, None)] * count, (None, None)],
    )
    return float(found.fun)


def ahead(point: np.ndarray, surface: np.ndarray, axis: int) -> float:
    """How far it is ahead on one axis of what a mixture of SFT's settings has that is as good on the other two.

    NaN where SFT reaches the other two nowhere.
    """
    others = [a for a in range(3) if a != axis]
    found = linprog(
        -surface[:, axis], A_ub=-surface[:, others].T, b_ub=-point[others], A_eq=np.ones((1, len(surface))), b_eq=[1.0]
    )
    return float(point[axis] + found.fun) if found.success else float("nan")


def over_bases(measure: Callable[[np.ndarray], float], values: np.ndarray) -> Estimate:
    """`measure` of the mean over bases, with a jackknife's interval.

    Args:
        measure: `(...) -> float`.
        values: `(bases, ...)`.
    """
    count = len(values)
    whole = measure(values.mean(0))
    without = np.array([measure(np.delete(values, b, 0).mean(0)) for b in range(count)])
    error = np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    return Estimate(whole, float(student.ppf(0.975, count - 1) * error))


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean over bases."""
    return over_bases(float, np.asarray(values, dtype=float))
