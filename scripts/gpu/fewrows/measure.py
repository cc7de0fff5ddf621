"""What a tuned model gained and what it forgot: likelihoods of held-out rows, and greedy answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fewrows.rows import Row
from lfu.evaluation.prompts import fill, shipped_templates
from lfu.evaluation.score import ChoiceScores, answer_nll, exact_match, multiple_choice

# rows of the six wordings and of the greedy answers, which take longest; new tokens of an answer
WORDED, ANSWERED, NEW_TOKENS = 48, 96, 160


@torch.no_grad()
def measured(model: Any, tokenizer: Any, rows: Mapping[str, list[Row]], *, answers: bool = True) -> dict[str, Any]:
    """Nats a token (`lambada`: nats a word), accuracies in 0 to 1.

    Returns:
        `validation`, `test`, `dolly`, `lambada`: NLL. `wordings`: NLL of test rows under each shipped wording.
        `arc_easy`, `mmlu`: accuracy by likelihood per character; `..._sure`: mean probability of the right choice.
        `exact`, `exact_any`: greedy answers whose number is right, behind '####' or the last one anywhere.
    """
    nll = lambda name, rows, **more: answer_nll(model, tokenizer, rows, batch_size=32, **more).mean
    found: dict[str, Any] = {name: nll(name, rows[name]) for name in ("validation", "test", "dolly")}
    words = answer_nll(model, tokenizer, rows["lambada"], batch_size=64, render=_last_word)
    found["lambada"] = sum(words.nll) / len(words.nll)
    few = rows["test"][:WORDED]
    found["wordings"] = {
        name: nll(name, [row | {"question": fill(text, row)} for row in few])
        for name, text in shipped_templates("word_problems").items()
    }
    for name in ("arc_easy", "mmlu"):
        scores = multiple_choice(model, tokenizer, rows[name], batch_size=64)
        found[name], found[f"{name}_sure"] = scores.accuracy, _sure(scores, rows[name])
    if answers:
        said = exact_match(model, tokenizer, rows["test"][:ANSWERED], batch_size=ANSWERED, max_new_tokens=NEW_TOKENS)
        found["exact"], found["exact_any"] = said.accuracy, sum(said.correct_any) / len(said.correct_any)
    return found


def _last_word(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, str]:
    return row["question"], f" {row['answer']}"


def _sure(scores: ChoiceScores, rows: list[Row]) -> float:
    """The mean of softmax(log-likelihood) at the right choice: it moves where the accuracy does not yet."""
    total = 0.0
    for values, row in zip(scores.loglik, rows):
        top = max(values)
        total += math.exp(values[row["answer"]] - top) / sum(math.exp(value - top) for value in values)
    return total / len(rows)
