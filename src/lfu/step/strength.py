"""What "auto" means: lam that holds the strength of the consistency, and an alpha that the dtype can show.

lam: the gradient of lam * ||h' - h||^2 is of first order in alpha, its value of second order. So the value says nothing
about the strength; the gradient, beside SFT's, does.

alpha: bfloat16 resolves a 128th. The paper's alpha of 0.1 moves the hidden states of a real model by hardly more, and
then h' - h is mostly rounding: its gradient points elsewhere, and lam="auto" measures noise. A longer ascent helps, and
less of lam in proportion keeps the strength (docs/method.md has figures).
"""

import math
from collections.abc import Mapping
from statistics import median

from lfu.step.record import Record

PAPER = 0.1  # alpha where the dtype resolves it, as float32 does
LONGEST = 100.0  # times that, at most
RESOLVED = 5.0  # machine epsilons that the median layer is to move by: then the gradient's cosine to float32's is 0.99
DECAY = 0.8  # remembers some five micro-batches: fewer would swing with each batch, more would lag behind


class RunningMean:
    """A geometric mean over micro-batches, for what spans orders of magnitude; the first one counts in full."""

    def __init__(self) -> None:
        self.mean_log = self.weight = 0.0

    def learn(self, value: float) -> None:
        """Zero and non-finite values teach nothing."""
        if math.isfinite(value) and value > 0:
            self.mean_log = DECAY * self.mean_log + (1 - DECAY) * math.log(value)
            self.weight = DECAY * self.weight + 1 - DECAY

    @property
    def mean(self) -> float | None:
        return math.exp(self.mean_log / self.weight) if self.weight else None

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"mean_log": self.mean_log, "weight": self.weight}

    def load_state(self, state: Mapping[str, float]) -> None:
        vars(self).update((name, float(value)) for name, value in state.items())


class Strength(RunningMean):
    """`lam="auto"`: lam such that ||grad(lam * consistency)|| / ||grad(SFT)|| stays near `target`.

    The ratio is linear in lam, so lam = target / r, with r the mean ratio at lam = 1. `start` is lam of the very first
    micro-batch, small enough not to act: it only measures.
    """

    def __init__(self, target: float, start: float):
        super().__init__()
        self.target, self.start = target, start

    @property
    def lam(self) -> float:
        return self.start if self.mean is None else self.target / self.mean


class Reach(RunningMean):
    """`alpha="auto"`: the paper's, or as much more as moves the median layer by `RESOLVED` epsilons of its dtype.

    How far a layer moves is linear in alpha: the mean is of the displacement per unit of alpha.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wanted = 0.0  # displacement

    @property
    def times(self) -> float:
        """Alpha over the paper's, from 1 to `LONGEST`; lam is divided by it."""
        return 1.0 if self.mean is None else min(max(self.wanted / self.mean / PAPER, 1.0), LONGEST)

    def state(self) -> dict[str, float]:
        return super().state() | {"wanted": self.wanted}

    def watch(self, record: Record) -> None:
        """Learn how far a micro-batch moved; one without an ascent teaches nothing."""
        if record.displacement and record.skipped is None:
            self.wanted = RESOLVED * record.resolution
            self.learn(median(record.displacement.values()) / record.alpha)
