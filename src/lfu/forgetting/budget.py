"""What may be forgotten: a budget, how much of it is spent, and whether that is more than noise.

**Spent**, in the same unit for both measures, so that 0.02 reads "two per cent":

- `questions`: of the built-in questions that the untouched model knew, the share that was lost net of those gained;
- `prose`: the rise of the loss on plain prose, in nats per token (0.02 nats are 2 % of perplexity).

A user's file has its own name here, and is either kind.

**Beyond the noise** is a sequential test. At reading k, H0 says that over all items that might have been asked the
spending is at most the budget. The evidence against it is an e-value: what a fair bettor against H0 would own after
all items, starting from 1. At a true H0 an e-value exceeds 1/a with a probability of at most a. Reading k may use
a_k = ALPHA / (k (k + 1)), and these add up to ALPHA, divided by the number of measures: so a run that keeps to its
budget at all its readings is stopped with a probability of at most ALPHA, however many readings there are.

- Questions: each is +1 (lost), -1 (gained) or 0, less the budget if it was known. A bettor who stakes a fixed share L
  gains a factor 1 + L x on each (Waudby-Smith and Ramdas, arXiv 2010.09686); averaged over a grid of L.
- Texts: E[1 + tanh(L x)] <= 1 for x distributed symmetrically about 0 or less, as tanh is odd and rises; x is the rise
  less the budget, L in units of 1 / the root mean square of x, which the signs of x don't enter.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from lfu.forgetting.answers import Answers, compare, right
from lfu.forgetting.items import PROSE, QUESTIONS, ItemSet

ALPHA = 0.05
STAKES = (0.1, 0.25, 0.6)  # of a bettor's money, on questions
TILTS = (0.25, 0.5, 1.0, 2.0)  # in units of 1 / rms, on texts


def parsed(budget: float | str | Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float]:
    """Measure -> how much of it may be spent. A plain number is for both questions and prose.

    Args:
        budget: a number, a mapping, or text as in `questions=0.02,prose=0.05`.
        names: the sets that are measured.

    Raises ValueError: no number above 0, or a name that is not measured.
    """
    if budget is None:
        return {}
    given: Mapping[str, Any] = budget if isinstance(budget, Mapping) else dict.fromkeys((QUESTIONS, PROSE), budget)
    if isinstance(budget, str) and "=" in budget:
        given = {name.strip(): value for name, _, value in (part.partition("=") for part in budget.split(","))}
    return {name: _limit(name, value, names) for name, value in given.items()}


def _limit(name: str, value: Any, names: Sequence[str]) -> float:
    if name not in names:
        raise ValueError(f"forgetting budget: {name!r} is not measured: give {', '.join(names)}")
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"forgetting budget for {name}: give a number above 0, such as 0.02, not {value!r}")
    return found


def spent(before: Answers, after: Answers, each: ItemSet) -> float:
    """How much of a set's measure is spent: net share of known questions, or nats per token."""
    figures = compare(before, Answers(after.chosen, after.nll), [each])
    return next(value for name, value in figures.items() if name.endswith(("net_lost", "rise")))


def evidence(before: Answers, after: Answers, each: ItemSet, budget: float) -> float:
    """The e-value against "at most `budget` is spent", as its natural logarithm."""
    exact = partial(torch.tensor, dtype=torch.float64)
    if each.choice:
        now = right(after, each)
        was = exact(right(before, each)[: len(now)])
        net = (was - exact(now) - budget * was) / max(1.0, budget)  # at least -1
        logs = [torch.log1p(L * net).sum() for L in STAKES]
    else:
        nll = exact(after.nll[each.name])
        over = nll - exact(before.nll[each.name][: len(nll)]) - budget
        in_rms = over / over.square().mean().sqrt().clamp(min=torch.finfo(over.dtype).tiny)
        logs = [(math.log(2) + logsigmoid(2 * L * in_rms)).sum() for L in TILTS]  # log(1 + tanh(L x))
    return float(torch.stack(logs).logsumexp(0)) - math.log(len(logs))


def beyond_noise(log_evidence: float, reading: int, measures: int) -> bool:
    """Whether reading number `reading` (from 1) shows that one of so many `measures` is over its budget.

    NaN does: it is what a broken model gives.
    """
    return not log_evidence < math.log(reading * (reading + 1) * measures / ALPHA)
