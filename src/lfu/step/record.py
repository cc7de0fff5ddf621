"""What happened in one micro-batch, and why something was left out of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean


class Skip(StrEnum):
    """Why the consistency was left out. The one place where the reasons are spelled."""

    NO_TOKEN = "no labelled token"
    NO_ASCENT = "zero ascent gradient"
    ABOVE = "theta lies above the compared layers"
    LOSS = "non-finite loss"
    ASCENT = "non-finite ascent gradient"
    CONSISTENCY = "non-finite consistency"
    GRADIENT = "non-finite gradient"
    CONSISTENCY_GRADIENT = "non-finite consistency gradient"


class BadBatch(ArithmeticError):
    """Raised under `on_bad_batch="raise"`; the gradients on theta are finite."""


@dataclass
class Record:
    """What happened in one micro-batch. Plain numbers; losses in nats a token.

    Attributes:
        sft_loss: mean over this micro-batch's answer tokens (Eq. 1).
        consistency: mean over its answer tokens and the compared layers (Eq. 5).
        consistency_per_layer: layer -> mean over answer tokens; layer K + 1 stands for the logits.
        displacement: layer -> ||h' - h|| / ||h||, Frobenius norms over the answer tokens.
        ascent_grad_norm: ||g|| of Eq. 2 at the first step, for the mean loss of the ascent batch.
        gradient_ratio: ||grad(lam * consistency)|| / ||grad(SFT)|| on (a sample of) theta.
        gradient_cosine: cosine between the two.
        resolution: machine epsilon of the hidden states' dtype, or of autocast's or quantised layers' where that is
            coarser; a displacement near it is rounding, not the ascent.
        alpha: the length of the ascent step.
        lam: the weight used; with `every=k` k times lam, and 0 where the consistency was not due.
        tokens: N, the answer tokens.
        pieces: in how many pieces of rows the perturbed pass was done; more than 1 where memory ran out.
        form: `exact`, `first-order` (`stale`: no gradient ratio, cosine and norm then), or `not due` (`every`).
        approximate: the approximate settings of the run, as in `every=4`; empty for the exact method.
        skipped: why the consistency (or, for a non-finite loss, everything) was left out, one of `Skip`; else None.
    """

    sft_loss: float = math.nan
    consistency: float = 0.0
    consistency_per_layer: dict[int, float] = field(default_factory=dict)
    displacement: dict[int, float] = field(default_factory=dict)
    ascent_grad_norm: float = 0.0
    gradient_ratio: float = 0.0
    gradient_cosine: float = 0.0
    resolution: float = 0.0
    alpha: float = 0.0
    lam: float = 0.0
    tokens: int = 0
    pieces: int = 1
    form: str = "exact"
    approximate: str = ""
    skipped: str | None = None

    @property
    def loss(self) -> float:
        """Eq. 6."""
        return self.sft_loss + self.lam * self.consistency

    def skip(self, reason: Skip) -> None:
        """Notes the reason, unless there is one already."""
        self.skipped = self.skipped or reason

    def figures(self, layers: bool = False) -> dict[str, float]:
        """What trainers log, by name; with `layers` consistency and displacement of each layer, too.

        What a micro-batch did not show is left out, and not counted as zero.
        """
        found = {"skipped": float(self.skipped is not None), "lam": self.lam, "alpha": self.alpha}
        if self.approximate:
            found["approximate"] = 1.0
        if self.tokens and self.skipped != Skip.LOSS:
            found["sft_loss"] = self.sft_loss
        if self.skipped is not None or not self.displacement:  # left out, not due, or lam = 0
            return found
        if self.form == "exact":  # one backward gives no ratio
            found |= {name: getattr(self, name) for name in ("gradient_ratio", "gradient_cosine", "ascent_grad_norm")}
        if self.pieces > 1:
            found["pieces"] = self.pieces
        found |= {"consistency": self.consistency, "displacement": fmean(self.displacement.values())}
        if layers:
            found |= {f"consistency/{n:02d}": value for n, value in self.consistency_per_layer.items()}
            found |= {f"displacement/{n:02d}": value for n, value in self.displacement.items()}
        return found

    # -- several processes: numbers travel, not texts ------------------------------------------------------------------

    def numbers(self) -> list[float]:
        """What of this process's record the others need."""
        code = -1 if self.skipped is None else list(Skip).index(Skip(self.skipped))
        squares = (value**2 for value in self.displacement.values())
        return [self.tokens, code, self.sft_loss, *self.consistency_per_layer.values(), *squares]

    def become_everyones(self, numbers: Sequence[Sequence[float]]) -> None:
        """From the `numbers` of all processes the record of all: means over all answer tokens.

        Skipped where no process went on, or a non-finite value shows in one.
        """
        tokens, codes, losses, *rest = zip(*numbers)
        told = [list(Skip)[int(code)] for code in codes if code >= 0]
        broken = [reason for reason in told if "non-finite" in reason]
        self.skipped = broken[0] if broken else None if len(told) < len(codes) else told[0]
        self.tokens, self.sft_loss = int(sum(tokens)), _mean(losses, tokens)
        means = [_mean(column, tokens) for column in rest]
        layers = list(self.consistency_per_layer)
        self.consistency_per_layer = dict(zip(layers, means))
        self.consistency = math.fsum(means[: len(layers)]) / max(len(layers), 1)
        self.displacement = {n: math.sqrt(m) for n, m in zip(self.displacement, means[len(layers) :])}


def _mean(values: Sequence[float], tokens: Sequence[float]) -> float:
    """Weighted by tokens; what has none is not asked."""
    return math.fsum(v * n for v, n in zip(values, tokens) if n) / max(sum(tokens), 1)
