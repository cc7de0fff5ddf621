"""Scores of an in-memory causal language model: answer NLL, multiple choice, perplexity, exact match.

Plain functions of (model, tokenizer, rows). All of them work in batches, leave the model's train/eval state and
every random generator as they found them, and return one number per item, so that two models scored on the same
items can be compared in pairs (see `intervals`). A score doesn't depend on the batch size, but for rounding.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch

from lfu.data.turns import shared_start
from lfu.evaluation import batching
from lfu.evaluation.batching import Progress, batches, continuations, forward, nll_of, padded, tick, token_nll
from lfu.evaluation.pieces import Asked, Piece, Render, answer_pieces, chat_pair, encode, text_pieces
from lfu.support.annotations import Model, Tokenizer

KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer"}  # layers of a cache
SHORT = 64  # tokens of a question; of shorter ones more are read at a time
Choices = tuple[list[int], list[list[int]]]  # tokens of the prompt that all choices share, and the rest of each choice


@dataclass(frozen=True)
class TokenScores:
    """Negative log-likelihood per item: the sum over its scored tokens (nats), and how many tokens those are."""

    nll: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Mean NLL per token over all items (nats); its exponential is the perplexity."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def each(self) -> list[float]:
        """NLL per token of each item."""
        return [nll / tokens for nll, tokens in zip(self.nll, self.tokens)]


@dataclass(frozen=True)
class ChoiceScores:
    """Multiple choice: the log-likelihood of every choice (nats), and per item the choice taken and if it is right.

    Taken is the choice with the largest log-likelihood per character, as in lm-eval's `acc_norm`.
    """

    loglik: list[list[float]]
    chosen: list[int]
    correct: list[bool]

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


def answer_nll(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 8,
    render: Render | None = None, progress: Progress | None = None,
) -> TokenScores:  # fmt: skip
    """NLL of each row's answer given its question; only the answer's tokens are scored.

    Rows are `{"question", "answer"}`, or whatever `render` makes (prompt, answer) of; by default `chat_pair` does, with
    the tokenizer's chat template. Here as below `progress` is called with the number of items just finished.

    Raises ValueError: no rows; an answer without a token; a tokenizer without chat template and no `render`.
    """
    pieces = answer_pieces(tokenizer, rows, render=render)
    nll = token_nll(model, tokenizer, pieces, batch_size, lambda index: tick(progress))
    return TokenScores(nll, [piece.tokens for piece in pieces])


def perplexity(
    model: Model, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 8, window: int = 1024,
    progress: Progress | None = None,
) -> TokenScores:  # fmt: skip
    """NLL of plain texts; `math.exp(result.mean)` is their perplexity.

    The first token of a text follows nothing and isn't scored. A text longer than `window` tokens is read in
    consecutive windows, each starting as a text does, so that nothing is cut off.

    Raises ValueError: no texts; a text with fewer than two tokens.
    """
    pieces = text_pieces(tokenizer, texts, window, start=1)
    left = Counter(piece.item for piece in pieces)  # pieces of each text that are still to be read

    def done(index: int) -> None:
        left[pieces[index].item] -= 1
        if not left[pieces[index].item]:
            tick(progress)

    nll, tokens = [0.0] * len(texts), [0] * len(texts)
    for piece, value in zip(pieces, token_nll(model, tokenizer, pieces, batch_size, done)):
        nll[piece.item] += value
        tokens[piece.item] += piece.tokens
    return TokenScores(nll, tokens)


def multiple_choice(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 8, cached: bool = True,
    progress: Progress | None = None,
) -> ChoiceScores:  # fmt: skip
    """Which choice does the model find likeliest as the continuation of 'Question: ...\\nAnswer:'?

    No chat template: the question is put as plain text, as lm-evaluation-harness does for ARC and PIQA.

    Args:
        rows: `{"question": str, "choices": list of str, "answer": index of the right one}`.
        batch_size: questions per forward pass, more of those with fewer than `SHORT` tokens.
        cached: read each prompt once; its choices continue from the key-value cache. False: read every choice with its
            whole prompt. Slower, but the number of forward passes follows from the number of rows alone.

    Raises ValueError: no rows; an answer that is no index into its choices; prompt and choice merged into one token.
    """
    if not rows:
        raise ValueError("no rows to score")
    items, cached = [_choice_ids(tokenizer, row) for row in rows], cached and not batching.prompt_tuned(model)
    loglik: list[list[float]] = [[] for _ in rows]
    with batching.evaluating(model), torch.no_grad():
        for batch in batches([len(prompt) for prompt, _ in items], batch_size, SHORT * batch_size if cached else 0):
            some = [items[i] for i in batch]
            found = _choice_batch(model, tokenizer, some) if cached else None
            cached = found is not None
            for index, values in zip(batch, found or _whole_choices(model, tokenizer, some)):
                loglik[index] = values
                tick(progress)
    chosen = [likeliest(values, row["choices"]) for row, values in zip(rows, loglik)]
    correct = [choice == row["answer"] for row, choice in zip(rows, chosen)]
    return ChoiceScores(loglik, chosen, correct)


def likeliest(loglik: Sequence[float], choices: Sequence[str] | None = None) -> int:
    """The index of the largest log-likelihood, or with the choices' texts of the largest per character; -1 with NaN."""
    if any(map(math.isnan, loglik)):
        return -1
    lengths = [1] * len(loglik) if choices is None else [max(1, len(choice)) for choice in choices]
    return max(range(len(loglik)), key=lambda place: loglik[place] / lengths[place])


def _choice_ids(tokenizer: Tokenizer, row: Mapping[str, Any]) -> Choices:
    if not 0 <= row["answer"] < len(row["choices"]):
        raise ValueError(f"answer {row['answer']!r} is no index into the choices of {row['question']!r}")
    text = f"Question: {row['question']}\nAnswer:"
    prompt = encode(tokenizer, text, special=True)
    wholes = [encode(tokenizer, f"{text} {choice}", special=True) for choice in row["choices"]]
    seam = min(shared_start(prompt, whole) for whole in wholes)
    if not seam:
        raise ValueError(f"prompt and choices share no first token, so nothing to condition on: {row['question']!r}")
    return prompt[:seam], [whole[seam:] for whole in wholes]


def _choice_batch(model: Model, tokenizer: Tokenizer, items: Sequence[Choices]) -> list[list[float]] | None:
    """Log-likelihood (nats) of every choice of every item: prompts once, then the choices on the shared cache.

    None where a cache holds more than keys and values, as those of Mamba and linear attention do: it goes on once only.
    """
    filler = batching.pad_id(tokenizer)
    ids, mask = batching.left_pad([prompt for prompt, _ in items], filler, model.device)
    out = forward(model, ids, mask, keep=1, use_cache=True)
    # the prompt's last position already says how likely each choice's FIRST token is: one-token choices end here
    first = out.logits[:, -1].float().log_softmax(-1)  # (B, V)
    values = [[float(first[row, choice[0]]) for choice in choices] for row, (_, choices) in enumerate(items)]
    longer = [(row, c) for row, (_, choices) in enumerate(items) for c, choice in enumerate(choices) if choice[1:]]
    if not longer:
        return values
    cache: Any = getattr(out, "past_key_values", None)
    if not {type(layer).__name__ for layer in getattr(cache, "layers", [None])} <= KEYS_AND_VALUES:
        return None
    owner = torch.tensor([row for row, _ in longer], device=ids.device)
    cache.batch_select_indices(owner)
    tails = [items[row][1][c] for row, c in longer]
    fed = padded([tail[:-1] for tail in tails], filler, ids.device)  # what follows is never looked at
    seen = padded([[1] * (len(tail) - 1) for tail in tails], 0, ids.device)
    logits = forward(model, fed, torch.cat([mask[owner], seen], 1), keep=0, past_key_values=cache).logits
    for n, ((row, c), tail) in enumerate(zip(longer, tails)):
        values[row][c] -= nll_of(logits[n, : len(tail) - 1], torch.tensor(tail[1:], device=ids.device))
    return values


def _whole_choices(model: Model, tokenizer: Tokenizer, items: Sequence[Choices]) -> list[list[float]]:
    """As `_choice_batch`, in one forward pass and without a cache."""
    pieces = [Piece(prompt + choice, len(prompt)) for prompt, choices in items for choice in choices]
    values = iter(token_nll(model, tokenizer, pieces, len(pieces), lambda index: None))
    return [[-next(values) for _ in choices] for _, choices in items]


def exact_match(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], *, max_new_tokens: int = 128,
    batch_size: int = 16, render: Render | None = None, progress: Progress | None = None,
) -> MatchScores:  # fmt: skip
    """Generate an answer to each row's question, greedily, and compare the final number with the reference's.

    Rows are those of `answer_nll`, with answers that end in '#### n'. A generation that has not come to its number
    after `max_new_tokens` counts as wrong.

    Raises ValueError: no rows; a reference answer without '#### n'; no chat template and no `render`.
    """
    if not rows:
        raise ValueError("no rows to score")
    pairs = [Asked(*(render or chat_pair)(tokenizer, row)) for row in rows]
    wanted = [final_number(asked.answer) for asked in pairs]
    if None in wanted:
        raise ValueError(f"reference answer {wanted.index(None)} doesn't end in '#### number'")
    prompts = [encode(tokenizer, asked.prompt, asked.plain) for asked in pairs]
    texts = continuations(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    strict = [final_number(text) == number for text, number in zip(texts, wanted)]
    loose = [final_number(text, anywhere=True) == number for text, number in zip(texts, wanted)]
    return MatchScores(texts, strict, loose)


_NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d{1,3}(?!\d))?"
# not the first part of 1/2 or 3:30
_FINAL = re.compile(rf"####\s*\$?\s*({_NUMBER})(?!\d)(?![\d,.]*\s*[/:^]\s*\d)")


def final_number(text: str, anywhere: bool = False) -> Decimal | None:
    """The number behind the first '####' of a text, or `anywhere` its last one, or None; commas in it are dropped."""
    numbers = [found[1]] if (found := _FINAL.search(text)) else re.findall(_NUMBER, text) if anywhere else []
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
