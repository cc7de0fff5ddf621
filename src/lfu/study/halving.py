"""Successive halving: many candidates get a short training, the better third a longer one, and so on.

Jamieson and Talwalkar 2016, arXiv 1502.07943, with a factor of 3: for N candidates the search takes 2 N / 9 times the
steps of a whole training; then the survivors are trained in full. As the plan, a pure function of the results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lfu.study.choose import pareto_front
from lfu.study.settings import YARDSTICK, Setting

if TYPE_CHECKING:
    from lfu.study.folder import Place

RUNGS = (1 / 9, 1 / 3)  # shares of a whole training
KEPT, LEAST = 1 / 3, 2  # of the candidates of a rung

Candidate = tuple[Setting, str]  # with its learning rate
Scores = Mapping[Candidate, tuple[float, float]]  # loss on the validation rows, loss on what should be kept


def short_steps(steps: int, share: float) -> int:
    """The steps of a candidate's training in the round that has this share of the whole."""
    return max(1, round(share * steps))


def scores_of(runs: Mapping[Candidate, Place], untouched: Place) -> Scores:
    """The scores of the candidates that did not fail; what was kept as a mean over the sets of loss over untouched."""
    scores, before = {}, untouched.kept or {}
    for candidate, run in runs.items():
        if not run.failed and run.validation is not None and math.isfinite(run.validation):
            ratios = [loss / before[name] for name, loss in (run.kept or {}).items() if before.get(name)]
            scores[candidate] = (run.validation, fmean(ratios) if ratios else 0.0)
    return scores


def best_first(scores: Scores) -> list[Candidate]:
    """The candidates by fronts: first those that no other beats at both; within a front by validation loss."""
    left, order = dict(scores), list[Candidate]()
    while left:
        front = pareto_front({each: (-loss, -kept) for each, (loss, kept) in left.items()})
        order += sorted(front, key=left.__getitem__)
        left = {each: score for each, score in left.items() if each not in front}
    return order


def passing(order: Sequence[Candidate]) -> list[Candidate]:
    """The best third, two at least, best first; and the best plain SFT, should none be among them."""
    kept = list(order[: max(LEAST, math.ceil(len(order) * KEPT))])
    plain = [each for each in order if each[0].method == YARDSTICK]
    return kept if set(plain) & set(kept) else kept + plain[:1]


def told(rungs: Sequence[Sequence[Any]]) -> str:
    """What was done, given the runs of each rung."""
    rounds = ", ".join(f"{len(runs)} trained for {share:.0%} of the steps" for share, runs in zip(RUNGS, rungs))
    return (
        f"Candidates were thinned out with the first seed: {rounds}; the best third of each round went on, by the loss "
        "on the validation rows and by what was kept on the items that choose. Short trainings favour what learns "
        "fast. The losses by learning rate are those of the first round."
    )
