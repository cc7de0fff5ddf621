"""Token ids through a model in batches: padding, the forward pass, greedy continuations, what a text's tokens cost.

All of it leaves the model's train/eval state and every random generator as they were. A result doesn't depend on the
batch size, but for rounding.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lfu.evaluation.pieces import Piece, end_of_turn
from lfu.model.anatomy import anatomy
from lfu.model.representations import hidden_of
from lfu.model.rng import Replay
from lfu.support.annotations import Model, Tokenizer

FEWEST_TOKENS = 8  # of a vocabulary; what has fewer logits tells classes apart

Progress = Callable[[int], None]  # called with the number of items just finished


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


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """A `PeftModel` with its adapter switched off inside; afterwards what requires a gradient is as it was.

    PEFT lets all of an adapter require one when it switches it on again, frozen parts too.
    """
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for p, flag in wanted:
            p.requires_grad_(flag)


def prompt_tuned(model: Any) -> bool:
    """Whether PEFT puts trained tokens in front of every pass: no padding may stand there, and no cache goes on."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


@contextmanager
def generators_kept(model: Model | None = None) -> Iterator[None]:
    """Afterwards Python's, numpy's and torch's random generators are as before, those of the model's devices too."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with Replay(() if model is None else (p.device for p in model.parameters()))():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def token_nll(
    model: Model, tokenizer: Tokenizer, pieces: Sequence[Piece], batch_size: int, done: Callable[[int], Any]
) -> list[float]:
    """Summed NLL (nats) of what counts of each piece; calls `done(index)` after each."""
    values = [0.0] * len(pieces)
    with evaluating(model), torch.no_grad():
        for batch in batches([len(piece.ids) for piece in pieces], 1 if prompt_tuned(model) else batch_size):
            some = [pieces[i] for i in batch]
            ids, mask = left_pad([piece.ids for piece in some], pad_id(tokenizer), model.device)
            longest = max(piece.tokens for piece in some)  # all at the right end
            logits = forward(model, ids, mask, keep=longest + 1).logits[:, :-1]  # (B, longest, V)
            for row, (index, piece) in enumerate(zip(batch, some)):
                values[index] = nll_of(logits[row, longest - piece.tokens :], ids[row, ids.shape[1] - piece.tokens :])
                done(index)
    return values


def continuations(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int,
    progress: Progress | None = None,
) -> list[str]:  # fmt: skip
    """Greedy continuations of prompts (token ids), in their order, without special tokens."""
    ends, texts = end_tokens(model, tokenizer), [""] * len(prompts)
    with evaluating(model), torch.no_grad():
        for batch in batches([len(prompt) for prompt in prompts], 1 if prompt_tuned(model) else batch_size):
            rows = generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens, ends)
            for index, row in zip(batch, rows):
                texts[index] = tokenizer.decode(row, skip_special_tokens=True)
                tick(progress)
    return texts


def end_tokens(model: Model, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's, those of the model's own settings for generation, and what the
    chat template writes, which in a base model's tokenizer is often none of them."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *(own if isinstance(own, list) else [own])} - {None})


def generate(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int, ends: list[int], **how: Any
) -> list[list[int]]:
    """Continuations, padded behind the first of the tokens `ends`: greedy, unless `how` tells the model otherwise."""
    ids, mask = left_pad(prompts, pad_id(tokenizer), model.device)
    # a model's own settings for sampling would only raise warnings here
    greedy: dict[str, Any] = {"do_sample": False} | dict.fromkeys(("temperature", "top_p", "top_k"))
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, num_beams=1, eos_token_id=ends or None,
        pad_token_id=pad_id(tokenizer), **greedy | how,
    )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


def forward(model: Model, ids: Tensor, mask: Tensor, *, keep: int, **more: Any) -> Any:
    """One forward pass; logits of the last `keep` positions only (0: all those of `ids`) if the model can.

    `mask` may be longer than `ids`: then its beginning belongs to the cache in `more`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # behind PEFT's wrapper
    accepted = inspect.signature(base.forward).parameters
    if prompt_tuned(model):
        more["use_cache"] = False
    elif "position_ids" in accepted:  # left padding must not move the positions of a model with absolute ones
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "logits_to_keep" in accepted:
        more["logits_to_keep"] = keep
    more.setdefault("use_cache", False)
    try:
        out = with_logits(model, input_ids=ids, attention_mask=mask, **more)
    except IndexError as error:  # of a table in the model; a GPU tells it in its own way
        raise ValueError(
            f"a row of {mask.shape[1]} tokens is longer than the model's table of positions, or has a token that the "
            "model doesn't know"
        ) from error
    if keep:
        out.logits = out.logits[:, -keep:]
    return out


def with_logits(model: Model, **inputs: Any) -> Any:
    """The model's output, with logits `(B, T, V)` also where its own forward leaves them out to save memory.

    Then the last hidden states are caught on a second pass, and the head is applied to them. Raises ValueError: a model
    with another head, such as a classifier or a reward model.
    """
    out = model(**inputs)
    if isinstance(logits := getattr(out, "logits", None), Tensor):
        if logits.dim() != 3 or logits.shape[-1] < FEWEST_TOKENS:
            raise ValueError(
                f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} and not one for each token of a "
                "vocabulary, so it can't be asked what it knows: forgetting is measured in causal language models"
            )
        return out
    parts, caught = anatomy(model), []
    with parts.final.register_forward_hook(lambda module, given, output: caught.append(hidden_of(output))):
        out = model(**inputs)
    head = parts.model.get_output_embeddings()
    out.logits = parts.logits(caught[-1].to(head.weight.dtype))
    return out


def nll_of(logits: Tensor, targets: Tensor) -> float:
    """Summed NLL (nats) of targets (T,) under logits (T, V), in float32."""
    return float(cross_entropy(logits.float(), targets, reduction="sum"))


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both (B, longest); left, so that every row ends in the last column."""
    ones = [[1] * len(row) for row in rows]
    return padded(rows, pad, device, left=True), padded(ones, 0, device, left=True)


def padded(rows: Sequence[Sequence[int]], value: int, device: Any = None, left: bool = False) -> Tensor:
    """`(B, longest)`: the rows, filled up with `value` on the right or the left."""
    width = max(len(row) for row in rows)
    fill = lambda row: [value] * (width - len(row))
    return torch.tensor([[*fill(row), *row] if left else [*row, *fill(row)] for row in rows], device=device)


def pad_id(tokenizer: Tokenizer) -> int:
    """Any valid id will do: padding is masked everywhere."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def batches(lengths: Sequence[int], size: int, tokens: int = 0) -> Iterator[list[int]]:
    """Indices in batches of like lengths (little padding), the longest first (too big a batch fails at once).

    Of short rows a batch holds more than `size`, up to so many `tokens`: then short passes don't cost more per token.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(size, tokens // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def tick(progress: Progress | None, count: int = 1) -> None:
    """So many more items are finished."""
    if progress is not None:
        progress(count)
