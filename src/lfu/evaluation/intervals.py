"""How sure is a measured mean, difference or share? Percentile bootstrap over items, seeded; Wilson's interval."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_CHUNK = 1_000_000  # resampled indices held at a time: bounds the memory for long item lists


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval, in the unit of the items."""

    value: float
    low: float
    high: float
    level: float = 0.95

    @property
    def sign(self) -> int:
        """+1 or -1 where the whole interval lies above or below zero, else 0: no difference beyond the noise."""
        return int(self.low > 0) - int(self.high < 0)


def mean_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, level: float = 0.95,
    resamples: int = 10_000, seed: int = 0,
) -> Interval:  # fmt: skip
    """Mean of the items and its percentile bootstrap interval.

    Args:
        values: one number per item.
        weights: with weights w the mean is sum(w * v) / sum(w), and items are drawn together with their weights. For
            NLL per token: v = nll / tokens, w = tokens.
        level: coverage aimed at, between 0 and 1. For few items (below some 20), and for shares near 0 or 1, the
            percentile bootstrap covers less than it says.

    Raises:
        ValueError: no values; lengths that differ; a level outside (0, 1); weights that aren't positive; NaN.
    """
    v, w = _checked(values, weights)
    _check_level(level)
    means = resampled((v * w)[None], w[None], resamples, seed)[:, 0]
    return percentiles((v * w).sum() / w.sum(), means, level)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], weights: Sequence[float] | None = None, *, level: float = 0.95,
    resamples: int = 10_000, seed: int = 0,
) -> Interval:  # fmt: skip
    """Mean of `ours - theirs` on the SAME items, and its interval: item by item, so that hard items cancel out.

    Raises:
        ValueError: as `mean_interval`, and for lists of different lengths.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"a paired difference needs the same items twice, got {len(ours)} and {len(theirs)}")
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    return mean_interval(differences.tolist(), weights, level=level, resamples=resamples, seed=seed)


def transitions(before: Sequence[bool], after: Sequence[bool]) -> dict[str, int]:
    """How many items were kept (right, right), lost (right, wrong), gained (wrong, right), never (wrong, wrong).

    Raises ValueError: lists of different lengths.
    """
    if len(before) != len(after):
        raise ValueError(f"transitions need the same items twice, got {len(before)} and {len(after)}")
    counts = Counter(zip(map(bool, before), map(bool, after)))
    names = {"kept": (True, True), "lost": (True, False), "gained": (False, True), "never": (False, False)}
    return {name: counts[pair] for name, pair in names.items()}


def wilson(hits: int, items: int, *, level: float = 0.95) -> Interval:
    """The share `hits / items` with Wilson's score interval, which holds its level where a share is near 0 or 1.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927).

    Raises ValueError: no items; more hits than items, or fewer than none; a level outside (0, 1).
    """
    if not 0 <= hits <= items or not items:
        raise ValueError(f"a share needs at least one item, and hits among them; got {hits} of {items}")
    _check_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / items, z**2 / items
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / items + spread / (4 * items))
    # at 0 and 1 the interval ends there exactly; rounding would leave it a hair short
    low, high = 0.0 if hits == 0 else centre - half, 1.0 if hits == items else centre + half
    return Interval(share, low, high, level)


def resampled(over: np.ndarray, under: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """`sum(over) / sum(under)` on resampled items, the same for all T rows: `(T, items)` twice to `(resamples, T)`."""
    rng = np.random.default_rng(seed)  # a generator of its own: numpy's global one is left alone
    found, (rows, items) = np.empty((resamples, len(over))), over.shape
    step = max(1, _CHUNK // (rows * items))
    for start in range(0, resamples, step):
        drawn = rng.integers(0, items, (min(step, resamples - start), items))
        found[start : start + len(drawn)] = (over[:, drawn].sum(-1) / under[:, drawn].sum(-1)).T
    return found


def percentiles(value: float, drawn: np.ndarray, level: float = 0.95) -> Interval:
    """An estimate with the percentile interval of its bootstrap replicates `(resamples,)`."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}")


def _checked(values: Sequence[float], weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """(values, weights) as float arrays; ValueError where they can't be averaged."""
    v = np.asarray(values, dtype=float)
    w = np.ones(len(v)) if weights is None else np.asarray(weights, dtype=float)
    if v.ndim != 1 or not len(v):
        raise ValueError("no values to average")
    if w.shape != v.shape:
        raise ValueError(f"got {len(v)} values but {len(w)} weights")
    if not np.isfinite(v).all():
        first = int(np.flatnonzero(~np.isfinite(v))[0])
        raise ValueError(f"value {first} is not a finite number, as from a model whose weights are broken")
    if not (np.isfinite(w).all() and (w > 0).all()):
        raise ValueError("weights must be finite and above zero")
    return v, w
