"""What fine-tuning gained and what it forgot: the same items, right or wrong before and after it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from lfu.data.shapes import choice_of
from lfu.data.turns import text_of
from lfu.evaluation.intervals import Interval, paired_difference, transitions
from lfu.evaluation.score import TokenScores


@dataclass(frozen=True)
class Forgetting:
    """Items right before and after (kept), only before (lost), only after (gained), neither time (never).

    `before` and `after` are accuracies, 0 to 1; `net` is after - before with its paired bootstrap interval;
    `mcnemar_p` is the two-sided p-value of the exact McNemar test that an item is as likely gained as lost.
    """

    items: int
    kept: int
    lost: int
    gained: int
    never: int
    before: float
    after: float
    net: Interval
    mcnemar_p: float


def forgetting(before: Sequence[bool], after: Sequence[bool], *, seed: int = 0) -> Forgetting:
    """Compares right and wrong on the same items, in the same order.

    Raises:
        ValueError: no items, or lists of different lengths.
    """
    counts = transitions(before, after)
    net = paired_difference(list(map(float, after)), list(map(float, before)), seed=seed)
    return Forgetting(
        items=len(before),
        **counts,
        before=fmean(map(bool, before)),
        after=fmean(map(bool, after)),
        net=net,
        mcnemar_p=mcnemar_p(counts["lost"], counts["gained"]),
    )


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test: a fair coin for each item that changed. 1 where none did.

    Source: McNemar, Psychometrika 12 (1947), in the exact binomial form.
    """
    changed = lost + gained
    # binomial coefficients up to the smaller of the two, each from the one before; whole numbers: nothing underflows
    ways = accumulate(range(min(lost, gained)), lambda ways, i: ways * (changed - i) // (i + 1), initial=1)
    return min(1.0, 2 * sum(ways) / 2**changed)


def perplexity_change(before: TokenScores, after: TokenScores, *, seed: int = 0) -> Interval:
    """Log of the perplexity ratio after / before on the same texts (nats per token), text by text.

    Raises:
        ValueError: other texts, or another tokenizer: perplexities per token can't be compared then.
    """
    if before.tokens != after.tokens:
        raise ValueError("the two models cut the texts into different tokens: their perplexities can't be compared")
    return paired_difference(after.each, before.each, [float(n) for n in before.tokens], seed=seed)


def against_base(
    rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Sequence[int]], texts: Mapping[str, TokenScores], base: str,
    *, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The results of a record of the kind `forgetting`: of every model but `base`, what it forgot.

    `rows` are as `choice_rows` gives them. By label: which choices were taken, and the scores of plain texts. Raises
    ValueError as `perplexity_change`.
    """
    right = {label: [one == row["answer"] for one, row in zip(taken, rows)] for label, taken in chosen.items()}
    tuned, old = [label for label in chosen if label != base], texts[base]

    def perplexity(new: TokenScores) -> dict[str, Any]:
        change = perplexity_change(old, new, seed=seed)
        return {"before": math.exp(old.mean), "after": math.exp(new.mean), "log_ratio": change}

    return {
        "questions": [{key: row[key] for key in ("question", "choices", "answer")} for row in rows],
        "chosen": {label: list(taken) for label, taken in chosen.items()},
        "texts": dict(texts),
        "forgetting": {label: forgetting(right[base], right[label], seed=seed) for label in tuned},
        "perplexity": {label: perplexity(texts[label]) for label in tuned},
    }


def choice_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Multiple-choice rows in one shape: `{"question": str, "choices": list of str, "answer": index}`.

    The right one is `answer` or `answerKey`; see `lfu.data.shapes.choice_of`. Raises ValueError as that does, or for a
    row without a question, with its number from 1.
    """
    return [_choice_row(row, number) for number, row in enumerate(rows, start=1)]


def _choice_row(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    try:
        question = text_of(row.get("question"), "column 'question'").strip()
        texts, right = choice_of(row, row["answer"] if row.get("answer") is not None else row.get("answerKey"))
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    if not question:
        raise ValueError(f"row {number}: no question")
    return {"question": question, "choices": [text.strip() for text in texts], "answer": right}
