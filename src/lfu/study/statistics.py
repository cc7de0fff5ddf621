"""How sure is a difference between two methods that were run with several seeds on the same items?

Two kinds of noise are added up. The items are drawn anew, alike for all runs (paired bootstrap). The seeds are too few
to be drawn: a bootstrap of n seeds knows their spread as if n were large, and with two or three of them holds the truth
6 or 8 times of 10. Their mean is off by Student's t with n - 1 degrees of freedom times s / sqrt(n), where s is the
standard deviation over the seeds of the paired differences (Student 1908, Biometrika 6). What differs by item and seed
at once is in both, which errs on the cautious side. With one seed the interval knows the items' noise alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from lfu.evaluation.intervals import Interval, percentiles

RESAMPLES = 4000
SHIFTS = 20  # draws of the seeds' noise for each resample of the items: with two seeds its tails are heavy
_CHUNK = 500  # resamples held at a time


@dataclass(frozen=True)
class Sample:
    """One run's scores under one metric, `over` and `under` of `(T, items)`.

    The metric of drawn items is `sum(over) / sum(under)`, for each of T templates; then their mean (`mean`, T = 1) or
    standard deviation over the templates (`std`, n - 1).
    """

    over: np.ndarray
    under: np.ndarray
    how: str = "mean"

    @classmethod
    def of(cls, values: Sequence[float], weights: Sequence[float] | None = None) -> Sample:
        """Items whose (weighted) mean is the metric."""
        w = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
        return cls((np.asarray(values, dtype=float) * w)[None], w[None])

    @property
    def items(self) -> int:
        return self.over.shape[1]

    @property
    def value(self) -> float:
        """The metric on all items."""
        return float(self.drawn(np.ones((1, self.items)))[0])

    def drawn(self, times: np.ndarray) -> np.ndarray:
        """The metric `(B,)` where item i was drawn `times[b, i]` times."""
        each = (times @ self.over.T) / (times @ self.under.T)  # (B, T)
        return each.std(axis=1, ddof=1) if self.how == "std" else each.mean(axis=1)


def difference(ours: Sequence[Sample], theirs: Sequence[Sample], *, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean over the seeds of ours minus theirs, with its interval; a sample for each seed in order, or one for all.

    Raises ValueError: no samples, other seeds, or other items.
    """
    if len(theirs) == 1:
        theirs = [theirs[0]] * len(ours)
    if not ours or len(ours) != len(theirs) or len({sample.items for sample in [*ours, *theirs]}) != 1:
        raise ValueError("a paired difference needs the same seeds and items twice")
    each = [one.value - two.value for one, two in zip(ours, theirs)]
    rng = np.random.default_rng(seed)
    drawn = np.empty(RESAMPLES)
    items = ours[0].items
    for start in range(0, RESAMPLES, _CHUNK):
        times = rng.multinomial(items, np.full(items, 1 / items), min(_CHUNK, RESAMPLES - start)).astype(float)
        gaps = [one.drawn(times) - two.drawn(times) for one, two in zip(ours, theirs)]
        drawn[start : start + len(times)] = np.mean(gaps, axis=0)
    if len(each) > 1:
        drawn = drawn[:, None] + _shifts(rng, each)
    return percentiles(fmean(each), drawn, level)


def _shifts(rng: np.random.Generator, each: Sequence[float]) -> np.ndarray:
    """How far the mean over so many seeds may be off, `(RESAMPLES, SHIFTS)`: each draw with either sign."""
    half = rng.standard_t(len(each) - 1, (RESAMPLES, SHIFTS // 2)) * stdev(each) / len(each) ** 0.5
    return np.concatenate([half, -half], axis=1)
