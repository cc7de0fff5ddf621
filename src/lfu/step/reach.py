"""`alpha="auto"`: an ascent that the dtype can show.

bfloat16 resolves a 128th. The paper's alpha of 0.1 moves the hidden states of a real model by hardly more, and then
h' - h is mostly rounding: its gradient points elsewhere, and lam="auto" measures noise. A longer ascent helps, and less
of lam in proportion keeps the strength, as the gradient is of first order in lam * alpha (docs/method.md has figures).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from lfu.step.record import Record

PAPER = 0.1  # alpha where the dtype resolves it, as float32 does
LONGEST = 100.0  # times that, at most
RESOLVED = 5.0  # machine epsilons that the median layer is to move by: then the gradient's cosine to float32's is 0.99


@dataclass
class Reach:
    """The paper's alpha, or as much more as moves the median layer by `RESOLVED` epsilons of its dtype.

    How far a layer moves is linear in alpha: a running geometric mean over micro-batches, as that of lam="auto".
    """

    decay: float = 0.8
    mean_log: float = 0.0  # of the displacement for each unit of alpha
    weight: float = 0.0
    wanted: float = 0.0  # displacement

    @property
    def times(self) -> float:
        """Alpha over the paper's, from 1 to `LONGEST`; lam is divided by it."""
        if not self.weight:
            return 1.0
        alpha = self.wanted * math.exp(-self.mean_log / self.weight)
        return min(max(alpha / PAPER, 1.0), LONGEST)

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"mean_log": self.mean_log, "weight": self.weight, "wanted": self.wanted}

    def update(self, record: Record) -> None:
        """Take in how far a micro-batch moved; one without an ascent teaches nothing."""
        moved = median(record.displacement.values()) if record.displacement and record.skipped is None else 0.0
        if not (math.isfinite(moved) and moved > 0):
            return
        self.wanted = RESOLVED * record.resolution
        self.mean_log = self.decay * self.mean_log + (1 - self.decay) * math.log(moved / record.alpha)
        self.weight = self.decay * self.weight + (1 - self.decay)
