"""Scores of an in-memory causal language model: answer NLL, multiple choice, perplexity, exact match.

Plain functions of (model, tokenizer, rows). All of them work in batches, leave the model's train/eval state and
every random generator as they found them, and return one number per item, so that two models scored on the same
items can be compared in pairs (see `intervals`). A score doesn't depend on the batch size, but for rounding.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from lfu.support.annotations import Model, Tokenizer

Progress = Callable[[int], None]  # called with the number of items just finished
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
        whole = _encode(tokenizer, prompt + answer)
        pieces.append((whole, _shared(_encode(tokenizer, prompt), whole)))
    nll = _token_nll(model, tokenizer, pieces, batch_size, lambda index: _tick(progress))
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
        ids = _encode(tokenizer, text, special=True)
        if len(ids) < 2:
            raise ValueError(f"text {number} has fewer than two tokens, so nothing to score: {text!r}")
        windows = [ids[start : start + window] for start in range(0, len(ids), window)]
        pieces += [(piece, 1) for piece in windows if len(piece) > 1]
        owner += [number for piece in windows if len(piece) > 1]
    left = Counter(owner)  # windows of each text that are still to be read

    def done(index: int) -> None:
        left[owner[index]] -= 1
        if not left[owner[index]]:
            _tick(progress)

    values = _token_nll(model, tokenizer, pieces, batch_size, done)
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
        for batch in _batches([len(prompt) for prompt, _ in items], batch_size):
            some = [items[i] for i in batch]
            found = _choice_batch(model, tokenizer, some) if cached else _whole_choices(model, tokenizer, some)
            for index, values in zip(batch, found):
                loglik[index] = values
                _tick(progress)
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
    prompts = [_encode(tokenizer, prompt) for prompt, _ in pairs]
    texts = [""] * len(rows)
    with evaluating(model), torch.no_grad():
        for batch in _batches([len(prompt) for prompt in prompts], batch_size):
            for index, text in zip(batch, _generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)):
                texts[index] = text
                _tick(progress)
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


def _encode(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Token ids; `special` adds what the tokenizer puts in front of plain text (a template brings its own)."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _shared(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the common beginning; scoring starts there, as tokens may merge over the seam behind a prompt."""
    for position, (left, right) in enumerate(zip(one, two)):
        if left != right:
            return position
    return min(len(one), len(two))


def _choice_ids(tokenizer: Tokenizer, row: Mapping[str, Any]) -> tuple[list[int], list[list[int]]]:
    """(the prompt's tokens that all choices share, the rest of each choice)."""
    if not 0 <= row["answer"] < len(row["choices"]):
        raise ValueError(f"answer {row['answer']!r} is no index into the choices of {row['question']!r}")
    text = f"Question: {row['question']}\nAnswer:"
    prompt = _encode(tokenizer, text, special=True)
    wholes = [_encode(tokenizer, f"{text} {choice}", special=True) for choice in row["choices"]]
    seam = min(_shared(prompt, whole) for whole in wholes)
    if not seam:
        raise ValueError(f"prompt and choices share no first token, so nothing to condition on: {row['question']!r}")
    return prompt[:seam], [whole[seam:] for whole in wholes]


# --- batches through the model -------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Eval mode inside; afterwards every module's own train/eval flag is back as it was."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _token_nll(
    model: Model,
    tokenizer: Tokenizer,
    pieces: Sequence[tuple[list[int], int]],
    batch_size: int,
    done: Callable[[int], None],
) -> list[float]:
    """Summed NLL (nats) of each piece (ids, first scored position >= 1); calls `done(index)` after each."""
    values = [0.0] * len(pieces)
    with evaluating(model), torch.no_grad():
        for batch in _batches([len(ids) for ids, _ in pieces], batch_size):
            ids, mask = _left_pad([pieces[i][0] for i in batch], _pad_id(tokenizer), model.device)
            longest = max(len(pieces[i][0]) - pieces[i][1] for i in batch)  # scored tokens, all at the right end
            logits = _forward(model, ids, mask, keep=longest + 1).logits[:, :-1]  # (B, longest, V)
            for row, i in enumerate(batch):
                scored = len(pieces[i][0]) - pieces[i][1]
                values[i] = _nll(logits[row, longest - scored :], ids[row, ids.shape[1] - scored :])
                done(i)
    return values


def _choice_batch(
    model: Model, tokenizer: Tokenizer, items: Sequence[tuple[list[int], list[list[int]]]]
) -> list[list[float]]:
    """Log-likelihood (nats) of every choice of every item: prompts once, then the choices on the shared cache."""
    ids, mask = _left_pad([prompt for prompt, _ in items], _pad_id(tokenizer), model.device)
    out = _forward(model, ids, mask, keep=1, use_cache=True)
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
    fed = torch.full((len(tails), width), _pad_id(tokenizer), device=ids.device)
    seen = torch.zeros_like(fed)
    for n, tail in enumerate(tails):  # right-padded: what follows a choice's end is never looked at
        fed[n, : len(tail) - 1] = torch.tensor(tail[:-1], device=ids.device)
        seen[n, : len(tail) - 1] = 1
    logits = _forward(model, fed, torch.cat([mask[owner], seen], 1), keep=0, past_key_values=cache).logits
    for n, ((row, c), tail) in enumerate(zip(longer, tails)):
        values[row][c] -= _nll(logits[n, : len(tail) - 1], torch.tensor(tail[1:], device=ids.device))
    return values


def _whole_choices(
    model: Model, tokenizer: Tokenizer, items: Sequence[tuple[list[int], list[list[int]]]]
) -> list[list[float]]:
    """As `_choice_batch`, in one forward pass and without a cache."""
    pieces = [(prompt + choice, len(prompt)) for prompt, choices in items for choice in choices]
    values = iter(_token_nll(model, tokenizer, pieces, len(pieces), lambda index: None))
    return [[-next(values) for _ in choices] for _, choices in items]


def _generate(model: Model, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of the prompts, without special tokens."""
    config = getattr(model, "generation_config", None)
    stop = getattr(config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    out = greedy(model, tokenizer, prompts, max_new_tokens, sorted(ends))
    return [tokenizer.decode(row, skip_special_tokens=True) for row in out]


def greedy(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int, ends: list[int], **more: Any
) -> Tensor:
    """Greedy continuations `(B, new)` of prompts (token ids), padded behind the first of the tokens `ends`.

    `more` goes to `model.generate`.
    """
    ids, mask = _left_pad(prompts, _pad_id(tokenizer), model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,  # a model's own sampling settings would only raise warnings here
        top_p=None,
        top_k=None,
        eos_token_id=ends or None,
        pad_token_id=_pad_id(tokenizer),
        **more,
    )
    return out[:, ids.shape[1] :]


def _forward(model: Model, ids: Tensor, mask: Tensor, *, keep: int, **more: Any) -> Any:
    """One forward pass; logits of the last `keep` positions only (0: all those of `ids`) if the model can.

    `mask` may be longer than `ids`: then its beginning belongs to the cache in `more`.
    """
    accepted = _parameters_of(model)
    if "position_ids" in accepted:  # left padding must not move the positions of a model with absolute ones
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "logits_to_keep" in accepted:
        more["logits_to_keep"] = keep
    more.setdefault("use_cache", False)
    out = with_logits(model, input_ids=ids, attention_mask=mask, **more)
    if keep:
        out.logits = out.logits[:, -keep:]
    return out


def with_logits(model: Model, **inputs: Any) -> Any:
    """The model's output, with logits `(B, T, V)` also where its own forward leaves them out to save memory.

    Then the last hidden states are caught on a second pass, and the head is applied to them.
    """
    out = model(**inputs)
    if isinstance(getattr(out, "logits", None), Tensor):
        return out
    from lfu.model.anatomy import anatomy
    from lfu.model.representations import hidden_of

    parts, caught = anatomy(model), []
    hook = parts.final.register_forward_hook(lambda module, given, output: caught.append(hidden_of(output)))
    try:
        out = model(**inputs)
    finally:
        hook.remove()
    head = parts.model.get_output_embeddings()
    out.logits = parts.logits(caught[-1].to(head.weight.dtype))
    return out


def _parameters_of(model: Model) -> set[str]:
    """Names of the forward arguments of the model proper, looked for behind PEFT's wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Summed NLL (nats) of targets (T,) under logits (T, V), in float32."""
    return float(cross_entropy(logits.float(), targets, reduction="sum"))


def _left_pad(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both (B, longest); left, so that every row ends in the last column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _pad_id(tokenizer: Tokenizer) -> int:
    """Any valid id will do: padding is masked everywhere."""
    found = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    return next(token for token in found if token is not None)


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths (little padding), the longest first (too big a batch fails at once)."""
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _need(items: Sequence[Any], what: str) -> None:
    if not items:
        raise ValueError(f"no {what} to score")


def _tick(progress: Progress | None) -> None:
    if progress is not None:
        progress(1)
