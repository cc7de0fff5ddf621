"""Live advice: what a run's records say about alpha and lam, once each, as a warning with numbers."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean, median

from lfu.step.record import Record
from lfu.support.errors import one_line

# How many micro-batches a judgement rests on. One says nothing: the ratio differs by factors between batches.
WINDOW = 16
NEGLIGIBLE, DOMINATING = 0.01, 3.0  # of the gradient ratio; SFT's own gradient is 1
COLLAPSE = 0.5  # of the displacement ||h' - h|| / ||h||
RESOLVED = 4  # displacements below so many machine epsilons are mostly rounding
SWING, TURNS = 0.5, 0.85  # of the mean loss; share of changes that reverse the one before (by chance: 2/3)


class LfUAdvice(UserWarning):
    """A run's figures look wrong; the message gives them, and says what to change."""


@contextmanager
def advice_heard() -> Iterator[list[str]]:
    """Within it no warning is shown; the yielded list holds the advice that was given, once it is over."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LfUAdvice)
        yield found
    found += [one_line(each.message) for each in heard if issubclass(each.category, LfUAdvice)]


class Advice:
    """Watches the records of a run with this `lam`, and gives each kind of warning once."""

    def __init__(self, lam: float | str, warn: Callable[[str], None] | None = None):
        self.lam = lam
        self.warn = warn or (lambda message: warnings.warn(message, LfUAdvice, stacklevel=4))
        self.reasons: deque[str | None] = deque(maxlen=WINDOW)
        self.records: deque[Record] = deque(maxlen=WINDOW)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.given: set[str] = set()

    def watch(self, record: Record) -> None:
        """Take in one micro-batch."""
        self.reasons.append(record.skipped)
        self._tell(self.reasons, self._skipping)
        if not record.skipped:
            self.records.append(record)
            self._tell(self.records, self._negligible, self._dominating, self._displacement, self._resolution)

    def watch_loss(self, loss: float) -> None:
        """Take in the SFT loss of one update (all its micro-batches)."""
        self.losses.append(loss)
        self._tell(self.losses, self._oscillation)

    def _tell(self, window: deque, *kinds: Callable[[], Iterator[str]]) -> None:
        for kind in kinds if len(window) == WINDOW else ():
            for message in kind() if kind.__name__ not in self.given else ():
                self.given.add(kind.__name__)
                self.warn(message)

    @property
    def alpha(self) -> float:
        """That of the newest record."""
        return self.records[-1].alpha

    @property
    def _settings(self) -> str:
        lam = self.lam if isinstance(self.lam, str) else f"{self.lam:g}"
        return f"median of {WINDOW} micro-batches; alpha {self.alpha:g}, lam {lam}"

    def _skipping(self) -> Iterator[str]:
        reasons = [reason for reason in self.reasons if reason]
        if len(reasons) > WINDOW / 2:
            yield (
                f"LfU was left out of {len(reasons)} of the last {WINDOW} micro-batches, so this is plain SFT at LfU's "
                f"cost. Newest reason: {reasons[-1]}. If the ascent gradient is zero, the auxiliary is not connected."
            )

    def _negligible(self) -> Iterator[str]:
        ratio = median(r.gradient_ratio for r in self.records)
        if ratio < NEGLIGIBLE and self.lam != "auto":
            yield (
                f"LfU does almost nothing: the consistency gradient is {ratio:.2g} of SFT's ({self._settings}). Raise "
                "lam * alpha, or use lam='auto'. If it is exactly 0, the auxiliary is not connected to the compared "
                "layers."
            )

    def _dominating(self) -> Iterator[str]:
        ratio, cosine = (median(getattr(r, f"gradient_{name}") for r in self.records) for name in ("ratio", "cosine"))
        remedy = f"Divide lam by about {ratio / 0.5:.0f}, or use lam='auto'."
        if self.lam == "auto":
            remedy = "SFT's gradient shrinks faster than lam can follow: lower the learning rate."
        if ratio > DOMINATING:
            yield (
                f"LfU dominates: the consistency gradient is {ratio:.2g} times SFT's, cosine {cosine:+.2f} "
                f"({self._settings}), so the model hardly learns the task. {remedy}"
            )

    def _displacement(self) -> Iterator[str]:
        moved = median(max(r.displacement.values(), default=0.0) for r in self.records)
        if moved > COLLAPSE:
            yield (
                f"alpha {self.alpha:g} is too large: the ascent moves hidden states by {moved:.0%} of their norm "
                f"(largest layer, median of {WINDOW} micro-batches). Models collapse there. Divide alpha by about "
                f"{moved / 0.1:.0f}."
            )

    def _resolution(self) -> Iterator[str]:
        moved, resolution = median(median(r.displacement.values()) for r in self.records), self.records[-1].resolution
        if moved < RESOLVED * resolution:
            yield (
                f"alpha {self.alpha:g} is too small for this precision: hidden states move by {moved:.1e} of their "
                f"norm, but their dtype (or autocast's) resolves only {resolution:.1e}. So the consistency term trains "
                "on rounding noise, and the gradient ratio measures that noise. Use alpha='auto', or float32."
            )

    def _oscillation(self) -> Iterator[str]:
        changes = [b - a for a, b in pairwise(self.losses)]
        turns = fmean(a * b < 0 for a, b in pairwise(changes))
        swing = fmean(abs(c) for c in changes) / max(fmean(self.losses), 1e-12)
        if turns > TURNS and swing > SWING:
            yield (
                f"the SFT loss oscillates: it changed direction at {turns:.0%} of the last {WINDOW} updates, by "
                f"{swing:.0%} of its mean each time. Lower the learning rate first, then lam."
            )
