"""Scores of an in-memory causal language model: answer NLL, multiple choice, perplexity, exact match.

Plain functions of (model, tokenizer, rows). All of them work in batches, leave the model's train/eval state and
every random generator as they found them, and return one number per item, so that two models scored on the same
items can be compared in pairs (see `intervals`). A score doesn't depend on the batch size, but for rounding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch

from lfu.evaluation.batching import (
    Progress,
    batches,
    continuations,
    encode,
    evaluating,
    forward,
    left_pad,
    nll_of,
    pad_id,
    shared_start,
    tick,
    token_nll,
)

if TYPE_CHECKING:
    from lfu.support.annotations import Model, Tokenizer

Render = Callable[[Any, Mapping[str, Any]], tuple[str, str]]  # (tokenizer, row) -> (prompt, answer), as text


@dataclass(frozen=True)
class TokenScores:
    """Negative log-likelihood per item: the sum over its scored tokens (nats), and how many tokens those are."""

    nll: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Mean NLL per token over all items (nats); its exponential is the perplexity."""
        return sum(self.nll) / sum(self.tokens)


@dataclass(frozen=True)
class ChoiceScores:
    """Multiple choice: the log-likelihood of every choice (nats), and per item whether the best one is right.

    `correct` goes by the log-likelihood per character of the choice, as lm-eval's `acc_norm` does; `correct_raw` by
    the plain sum (`acc`), which favours short choices.
    """

    loglik: list[list[float]]
    correct: list[bool]
    correct_raw: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right items by `correct`, 0 to 1."""
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class MatchScores:
    """Greedy generations, and per item whether the final number is the reference's.

    `correct` wants the number behind '####'. `correct_any` takes the last number of a text that has no '####', which
    is fairer to a model that was never shown that form.
    """

    text: list[str]
    correct: list[bool]
    correct_any: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right items by `correct`, 0 to 1."""
        return sum(self.correct) / len(self.correct)


# --- the four scores -----------------------------------------------------------------------------------------------


def answer_nll(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    render: Render | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """NLL of each row's answer given its question; only the answer's tokens are scored.

    Args:
        rows: `{"question", "answer"}`, or whatever `render` reads.
        render: makes (prompt, answer) of a row. Default `chat_pair`: the tokenizer's chat template.
        progress: called with the number of rows just finished.

    Raises:
        ValueError: no rows; a tokenizer without chat template and no `render`.
    """
    _need(rows, "rows")
    pieces = []
    for row in rows:
        prompt, answer = (render or chat_pair)(tokenizer, row)
        whole = encode(tokenizer, prompt + answer)
        pieces.append((whole, shared_start(encode(tokenizer, prompt), whole)))
    nll = token_nll(model, tokenizer, pieces, batch_size, lambda index: tick(progress))
    return TokenScores(nll, [len(ids) - start for ids, start in pieces])


def perplexity(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    window: int = 1024,
    progress: Progress | None = None,
) -> TokenScores:
    """NLL of plain texts; `math.exp(result.mean)` is their perplexity.

    The first token of a text follows nothing and isn't scored. A text longer than `window` tokens is read in
    consecutive windows, each starting anew, so that nothing is cut off.

    Raises:
        ValueError: no texts; a text with fewer than two tokens.
    """
    _need(texts, "texts")
    pieces, owner = [], []
    for number, text in enumerate(texts):
        ids = encode(tokenizer, text, special=True)
        if len(ids) < 2:
            raise ValueError(f"text {number} has fewer than two tokens, so nothing to score: {text!r}")
        windows = [ids[start : start + window] for start in range(0, len(ids), window)]
        pieces += [(piece, 1) for piece in windows if len(piece) > 1]
        owner += [number for piece in windows if len(piece) > 1]
    left = Counter(owner)  # windows of each text that are still to be read

    def done(index: int) -> None:
        left[owner[index]] -= 1
        if not left[owner[index]]:
            tick(progress)

    values = token_nll(model, tokenizer, pieces, batch_size, done)
    nll, tokens = [0.0] * len(texts), [0] * len(texts)
    for number, (piece, _), value in zip(owner, pieces, values):
        nll[number] += value
        tokens[number] += len(piece) - 1
    return TokenScores(nll, tokens)


def multiple_choice(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    cached: bool = True,
    progress: Progress | None = None,
) -> ChoiceScores:
    """Which choice does the model find likeliest as the continuation of 'Question: ...\\nAnswer:'?

    No chat template: the question is put as plain text, as lm-evaluation-harness does for ARC and PIQA.

    Args:
        rows: `{"question": str, "choices": list of str, "answer": index of the right one}`.
        batch_size: questions per forward pass.
        cached: read each prompt once; its choices continue from the key-value cache. False: read every choice with its
            whole prompt. Slower, but the number of forward passes follows from the number of rows alone.

    Raises:
        ValueError: no rows; an answer that is no index into its choices; prompt and choice merged into one token.
    """
    _need(rows, "rows")
    items = [_choice_ids(tokenizer, row) for row in rows]
    loglik: list[list[float]] = [[] for _ in rows]
    with evaluating(model), torch.no_grad():
        for batch in batches([len(prompt) for prompt, _ in items], batch_size):
            some = [items[i] for i in batch]
            found = _choice_batch(model, tokenizer, some) if cached else _whole_choices(model, tokenizer, some)
            for index, values in zip(batch, found):
                loglik[index] = values
                tick(progress)
    best, best_raw = [], []
    for row, values in zip(rows, loglik):
        per_character = [value / max(1, len(choice)) for value, choice in zip(values, row["choices"])]
        best.append(_argmax(per_character) == row["answer"])
        best_raw.append(_argmax(values) == row["answer"])
    return ChoiceScores(loglik, best, best_raw)


def exact_match(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    render: Render | None = None,
    progress: Progress | None = None,
) -> MatchScores:
    """Generate an answer to each row's question, greedily, and compare the final number with the reference's.

    Args:
        rows: `{"question", "answer"}`, the answer ending in '#### n', or whatever `render` reads.
        max_new_tokens: a generation is cut there; one that hasn't come to its number by then counts as wrong.

    Raises:
        ValueError: no rows; a reference answer without '#### n'; no chat template and no `render`.
    """
    _need(rows, "rows")
    pairs = [(render or chat_pair)(tokenizer, row) for row in rows]
    wanted = [final_number(answer) for _, answer in pairs]
    if None in wanted:
        raise ValueError(f"reference answer {wanted.index(None)} doesn't end in '#### number'")
    prompts = [encode(tokenizer, prompt) for prompt, _ in pairs]
    texts = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    strict = [final_number(text) == number for text, number in zip(texts, wanted)]
    loose = [final_number(text, anywhere=True) == number for text, number in zip(texts, wanted)]
    return MatchScores(texts, strict, loose)


# --- text in, numbers out ------------------------------------------------------------------------------------------


def chat_pair(tokenizer: Tokenizer, row: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a `{"question", "answer"}` row in the tokenizer's chat template.

    The prompt ends where the assistant's turn begins; the answer includes the end of that turn, as in TRL's
    prompt-completion data.

    Raises:
        ValueError: the tokenizer has no chat template, or one that rewrites the prompt once the answer is there.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: pass render=, which makes (prompt, answer) of a row")
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template doesn't keep the prompt in front of the answer: pass render= instead")
    return prompt, whole[len(prompt) :]


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_FINAL = re.compile(r"####\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)")


def final_number(text: str, anywhere: bool = False) -> Decimal | None:
    """The number behind the first '####' of a text, or None; thousands commas are dropped.

    Args:
        anywhere: where there is no '#### number', take the last number of the text.
    """
    found = _FINAL.search(text)
    if found:
        return _decimal(found[1])
    numbers = _NUMBER.findall(text) if anywhere else []
    return _decimal(numbers[-1]) if numbers else None


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def _choice_ids(tokenizer: Tokenizer, row: Mapping[str, Any]) -> tuple[list[int], list[list[int]]]:
    """(the prompt's tokens that all choices share, the rest of each choice)."""
    if not 0 <= row["answer"] < len(row["choices"]):
        raise ValueError(f"answer {row['answer']!r} is no index into the choices of {row['question']!r}")
    text = f"Question: {row['question']}\nAnswer:"
    prompt = encode(tokenizer, text, special=True)
    wholes = [encode(tokenizer, f"{text} {choice}", special=True) for choice in row["choices"]]
    seam = min(shared_start(prompt, whole) for whole in wholes)
    if not seam:
        raise ValueError(f"prompt and choices share no first token, so nothing to condition on: {row['question']!r}")
    return prompt[:seam], [whole[seam:] for whole in wholes]


def _choice_batch(
    model: Model, tokenizer: Tokenizer, items: Sequence[tuple[list[int], list[list[int]]]]
) -> list[list[float]]:
    """Log-likelihood (nats) of every choice of every item: prompts once, then the choices on the shared cache."""
    ids, mask = left_pad([prompt for prompt, _ in items], pad_id(tokenizer), model.device)
    out = forward(model, ids, mask, keep=1, use_cache=True)
    # the prompt's last position already says how likely each choice's FIRST token is: one-token choices end here
    first = out.logits[:, -1].float().log_softmax(-1)  # (B, V)
    values = [[float(first[row, choice[0]]) for choice in choices] for row, (_, choices) in enumerate(items)]
    longer = [(row, c) for row, (_, choices) in enumerate(items) for c, choice in enumerate(choices) if choice[1:]]
    if not longer:
        return values
    owner = torch.tensor([row for row, _ in longer], device=ids.device)
    cache = out.past_key_values
    cache.batch_select_indices(owner)
    tails = [items[row][1][c] for row, c in longer]
    width = max(len(tail) for tail in tails) - 1
    fed = torch.full((len(tails), width), pad_id(tokenizer), device=ids.device)
    seen = torch.zeros_like(fed)
    for n, tail in enumerate(tails):  # right-padded: what follows a choice's end is never looked at
        fed[n, : len(tail) - 1] = torch.tensor(tail[:-1], device=ids.device)
        seen[n, : len(tail) - 1] = 1
    logits = forward(model, fed, torch.cat([mask[owner], seen], 1), keep=0, past_key_values=cache).logits
    for n, ((row, c), tail) in enumerate(zip(longer, tails)):
        values[row][c] -= nll_of(logits[n, : len(tail) - 1], torch.tensor(tail[1:], device=ids.device))
    return values


def _whole_choices(
    model: Model, tokenizer: Tokenizer, items: Sequence[tuple[list[int], list[list[int]]]]
) -> list[list[float]]:
    """As `_choice_batch`, in one forward pass and without a cache."""
    pieces = [(prompt + choice, len(prompt)) for prompt, choices in items for choice in choices]
    values = iter(token_nll(model, tokenizer, pieces, len(pieces), lambda index: None))
    return [[-next(values) for _ in choices] for _, choices in items]


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _need(items: Sequence[Any], what: str) -> None:
    if not items:
        raise ValueError(f"no {what} to score")
