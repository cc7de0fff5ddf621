"""Successive halving: many candidates get a short training, the better third a longer one, and so on.

Jamieson and Talwalkar 2016, arXiv 1502.07943, with a factor of 3: for N candidates the search takes 2 N / 9 times the
steps of a whole training; then the survivors are trained in full. It is a pure function of the results, as the plan
is, so that any number of processes may work on it, and a killed study goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from lfu.study.choose import pareto_front

if TYPE_CHECKING:
    from lfu.study.folder import Place
    from lfu.study.plan import Run

RUNGS = (1 / 9, 1 / 3)  # shares of a whole training
KEPT, LEAST = 1 / 3, 2  # of the candidates of a rung

Scores = Mapping[str, tuple[float, float]]  # candidate -> (loss on the validation rows, loss on what should be kept)


@dataclass
class Rung:
    """One round.

    Attributes:
        share: of a whole training.
        runs: candidate -> its short training.
        passed: the candidates that go on, best first; empty while the round isn't over.
    """

    share: float
    runs: dict[str, Run]
    passed: list[str] = field(default_factory=list)


def scores_of(runs: Mapping[str, Run], found: Callable[[Run], Place], untouched: Place) -> Scores:
    """The scores of the candidates that did not fail; what was kept as a mean over the sets of loss over untouched."""
    scores = {}
    for name, run in runs.items():
        outcome = found(run)
        if outcome.failed or outcome.validation is None or not math.isfinite(outcome.validation):
            continue
        before = untouched.kept or {}
        ratios = [loss / before[each] for each, loss in (outcome.kept or {}).items() if before.get(each)]
        scores[name] = (outcome.validation, fmean(ratios) if ratios else 0.0)
    return scores


def best_first(scores: Scores) -> list[str]:
    """The candidates by fronts: first those that no other beats at both; within a front by validation loss."""
    left, order = dict(scores), []
    while left:
        front = pareto_front({name: (-loss, -kept) for name, (loss, kept) in left.items()})
        order += sorted(front, key=lambda name: left[name])
        for name in front:
            del left[name]
    return order


def passing(order: Sequence[str], always: Callable[[str], bool]) -> list[str]:
    """The best third, two at least, best first; and the best that `always` names, should none be among them."""
    kept = list(order[: max(LEAST, math.ceil(len(order) * KEPT))])
    if not any(always(name) for name in kept):
        kept += [name for name in order if always(name)][:1]
    return kept


def told(rungs: Sequence[Rung]) -> str:
    """One sentence about what was done."""
    rounds = ", ".join(f"{len(rung.runs)} trained for {rung.share:.0%} of the steps" for rung in rungs)
    return (
        f"Candidates were thinned out with the first seed: {rounds}; the best third of each round went on, by the loss "
        "on the validation rows and by what was kept on the items that choose. Short trainings favour what learns "
        "fast. The losses by learning rate are those of the first round."
    )
