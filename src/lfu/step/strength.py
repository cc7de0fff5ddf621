"""`lam="auto"`: holds the strength of the consistency term, by its gradient beside SFT's.

The gradient of lam * ||h' - h||^2 is first order in alpha, its value second order: the value says nothing about the
strength, the gradient does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Strength:
    """`lam="auto"`: lam such that ||grad(lam * consistency)|| / ||grad(SFT)|| stays near `target`.

    The ratio is linear in lam, so lam = target / r with r the ratio at lam = 1: a running geometric mean over
    micro-batches (it spans orders of magnitude), bias-corrected so that the first one counts in full.

    Args:
        target: the wanted ratio.
        start: lam of the very first micro-batch, small enough not to act: it only measures.
        decay: of the running mean; 0.8 remembers some five micro-batches: less would swing with each batch, more would
            lag behind while SFT's gradient shrinks.
    """

    target: float
    start: float
    decay: float = 0.8
    mean_log: float = 0.0
    weight: float = 0.0

    @property
    def lam(self) -> float:
        return self.target * math.exp(-self.mean_log / self.weight) if self.weight else self.start

    def update(self, unit_ratio: float) -> None:
        """Take in the gradient ratio at lam = 1; zero and non-finite values teach nothing."""
        if not (math.isfinite(unit_ratio) and unit_ratio > 0):
            return
        self.mean_log = self.decay * self.mean_log + (1 - self.decay) * math.log(unit_ratio)
        self.weight = self.decay * self.weight + (1 - self.decay)
