"""Live advice: what a run's records say about alpha and lam, once each, as a warning with numbers."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, median

from lfu.step.record import Record

# How many micro-batches a judgement rests on. One says nothing: the ratio differs by factors between batches.
WINDOW = 16
NEGLIGIBLE, DOMINATING = 0.01, 3.0  # of the gradient ratio; SFT's own gradient is 1
COLLAPSE = 0.5  # of the displacement ||h' - h|| / ||h||
RESOLVED = 4  # displacements below so many machine epsilons are mostly rounding
ROUNDED = 0.5  # of the ascent step, in L2 norm
SWING, TURNS = 0.5, 0.85  # of the mean loss; share of changes that reverse the one before (by chance: 2/3)


class LfUAdvice(UserWarning):
    """A run's figures look wrong; the message gives them, and says what to change."""


class Advice:
    """Watches the records of a run, and gives each kind of warning once.

    Args:
        alpha, lam: the settings named in the messages, numbers or `auto`.
        warn: takes the message; default `warnings.warn` with `LfUAdvice`.
    """

    def __init__(self, alpha: float | str, lam: float | str, warn: Callable[[str], None] | None = None):
        self.given_alpha, self.lam = alpha, lam
        self.warn = warn or (lambda message: warnings.warn(message, LfUAdvice, stacklevel=3))
        self.records: deque[Record] = deque(maxlen=WINDOW)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.given: set[str] = set()
        self.reasons: deque[str | None] = deque(maxlen=WINDOW)

    @property
    def alpha(self) -> float:
        """That of the newest record where it is chosen."""
        return self.records[-1].alpha if isinstance(self.given_alpha, str) else self.given_alpha

    def watch(self, record: Record) -> None:
        """Take in one micro-batch."""
        self.reasons.append(record.skipped)
        self._skipping()
        if record.skipped:
            return
        self.records.append(record)
        if len(self.records) == WINDOW:
            self._strength()
            self._displacement()
            self._resolution()
            self._rounding()

    def watch_loss(self, loss: float) -> None:
        """Take in the SFT loss of one update (all its micro-batches)."""
        self.losses.append(loss)
        if len(self.losses) == WINDOW:
            self._oscillation()

    def _once(self, kind: str, message: str) -> None:
        if kind not in self.given:
            self.given.add(kind)
            self.warn(message)

    def _strength(self) -> None:
        ratio = median(r.gradient_ratio for r in self.records)
        settings = f"alpha {self.alpha:g}, lam {self.lam if isinstance(self.lam, str) else format(self.lam, 'g')}"
        if ratio < NEGLIGIBLE and self.lam != "auto":
            self._once(
                "negligible",
                f"LfU does almost nothing: the consistency gradient is {ratio:.2g} of SFT's (median of {WINDOW} "
                f"micro-batches; {settings}). Raise lam * alpha, or use lam='auto'. If it is exactly 0, the "
                "auxiliary is not connected to the compared layers.",
            )
        if ratio > DOMINATING:
            cosine = median(r.gradient_cosine for r in self.records)
            remedy = f"Divide lam by about {ratio / 0.5:.0f}, or use lam='auto'."
            if self.lam == "auto":
                remedy = "SFT's gradient shrinks faster than lam can follow: lower the learning rate."
            self._once(
                "dominating",
                f"LfU dominates: the consistency gradient is {ratio:.2g} times SFT's, cosine {cosine:+.2f} (median of "
                f"{WINDOW} micro-batches; {settings}), so the model hardly learns the task. {remedy}",
            )

    def _skipping(self) -> None:
        reasons = [reason for reason in self.reasons if reason]
        if len(self.reasons) == WINDOW and len(reasons) > WINDOW / 2:
            self._once(
                "skipping",
                f"LfU was left out of {len(reasons)} of the last {WINDOW} micro-batches, so this is plain SFT at "
                f"LfU's cost. Newest reason: {reasons[-1]}. If the ascent gradient is zero, the auxiliary is "
                "not connected.",
            )

    def _resolution(self) -> None:
        displacement = median(median(r.displacement.values()) for r in self.records)
        resolution = self.records[-1].resolution
        if displacement < RESOLVED * resolution:
            self._once(
                "resolution",
                f"alpha {self.alpha:g} is too small for this precision: hidden states move by {displacement:.1e} of "
                f"their norm, but their dtype (or autocast's) resolves only {resolution:.1e}. So the consistency term "
                "trains on rounding noise, and the gradient ratio measures that noise. Use alpha='auto', or float32.",
            )

    def _rounding(self) -> None:
        rounded = median(r.rounded for r in self.records)
        if rounded > ROUNDED:
            self._once(
                "rounding",
                f"alpha {self.alpha:g} is too small for weights of this dtype: {rounded:.0%} of the ascent step is "
                f"lost in rounding (median of {WINDOW} micro-batches). Raise alpha at the same lam * alpha, keep the "
                "trained weights in float32, or use auxiliary='lora', which is float32 whatever the weights are.",
            )

    def _displacement(self) -> None:
        displacement = median(max(r.displacement.values(), default=0.0) for r in self.records)
        if displacement > COLLAPSE:
            self._once(
                "displacement",
                f"alpha {self.alpha:g} is too large: the ascent moves hidden states by {displacement:.0%} of their "
                f"norm (largest layer, median of {WINDOW} micro-batches). Models collapse there. Divide alpha by about "
                f"{displacement / 0.1:.0f}.",
            )

    def _oscillation(self) -> None:
        losses = list(self.losses)
        changes = [b - a for a, b in pairwise(losses)]
        turns = fmean(a * b < 0 for a, b in pairwise(changes))
        swing = fmean(abs(c) for c in changes) / max(fmean(losses), 1e-12)
        if turns > TURNS and swing > SWING:
            self._once(
                "oscillation",
                f"the SFT loss oscillates: it changed direction at {turns:.0%} of the last {WINDOW} updates, "
                f"by {swing:.0%} of its mean each time. Lower the learning rate first, then lam.",
            )
