"""Text that the untouched model wrote itself, and how far a model has moved from it there: KL divergence."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfu.evaluation.batching import forward
from lfu.evaluation.pieces import encode
from lfu.forgetting.deal import Dealer
from lfu.methods.tokens import kl_of_top, likeliest_tokens

PROMPT, NEW, TOP = 8, 40, 32  # tokens that a text is started with; that the model adds; kept of each distribution


@dataclass(frozen=True)
class Written:
    """Texts with the untouched model's likeliest tokens at each place that it wrote."""

    ids: Tensor  # (N, PROMPT + NEW) int64
    top: Tensor  # (N, NEW, K) int32: the K likeliest tokens
    logp: Tensor  # (N, NEW, K) float32: their log-probabilities (nats)


def write(model: Any, tokenizer: Any, texts: Sequence[str], dealer: Dealer, *, seed: int, cached: bool) -> Written:
    """Lets the model go on from the first tokens of `texts`, drawing at temperature 1, and keeps what it thought.

    Texts with fewer than `PROMPT` tokens are left out. What is written does not depend on how texts are dealt.
    """
    starts = [ids[:PROMPT] for ids in (encode(tokenizer, text, special=True) for text in texts) if len(ids) >= PROMPT]
    rows = dealer.over(list(enumerate(starts)), lambda part: _draw(model, part, seed, cached))
    if not rows:
        empty = torch.zeros(0, NEW, TOP)
        return Written(torch.zeros(0, PROMPT + NEW, dtype=torch.long), empty.int(), empty)
    ids = torch.tensor(rows)
    found = dealer.over(list(ids), lambda part: _likeliest(model, torch.stack(part)))
    return Written(ids, torch.stack([top for top, _ in found]), torch.stack([logp for _, logp in found]))


def seconds_to_write(model: Any, texts: int) -> float:
    """About how long `write` takes for so many texts: one of its passes, timed, for each token."""
    ids = torch.zeros(texts, 1, dtype=torch.long, device=next(model.parameters()).device)
    begun = time.monotonic()
    forward(model, ids, torch.ones_like(ids), keep=1).logits.argmax().item()
    return NEW * (time.monotonic() - begun)


def divergence(model: Any, written: Written, count: int, batch_size: int, dealer: Dealer) -> list[float]:
    """KL(untouched || model) of the first `count` texts, nats per token, at least 0.

    Over the untouched model's K likeliest tokens and all others as one, which is a lower bound of the whole sum (data
    processing) and zero for the same model.
    """

    def work(part: list[int]) -> list[float]:
        said = zip(part, _logits(model, written.ids[part], batch_size))
        kl = (kl_of_top(logits, written.top[i].long(), written.logp[i]) for i, logits in said)
        return [max(float(each.mean()), 0.0) for each in kl]  # NaN stays

    return dealer.over(list(range(min(count, len(written.ids)))), work)


def _draw(model: Any, numbered: list[tuple[int, list[int]]], seed: int, cached: bool) -> list[list[int]]:
    """Continuations by NEW tokens, by the Gumbel-max trick: each text has a generator of its own."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number, _ in numbered]
    device = next(model.parameters()).device
    ids = torch.tensor([start for _, start in numbered], device=device)
    fed, cache = ids, None
    for _ in range(NEW):
        more = {"use_cache": True} | ({"past_key_values": cache} if cache is not None else {}) if cached else {}
        out = forward(model, fed if cached else ids, torch.ones_like(ids), keep=1, **more)
        logits = out.logits[:, -1].float().cpu()
        noise = torch.stack([torch.rand(logits.shape[1], generator=g) for g in generators])
        fed = (logits - (-noise.clamp(min=1e-12).log()).log()).argmax(1, keepdim=True).to(device)
        ids = torch.cat([ids, fed], 1)
        cache = getattr(out, "past_key_values", None)
        cached = cached and cache is not None
    return ids.tolist()


def _likeliest(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    found = (likeliest_tokens(logits, TOP) for logits in _logits(model, ids, 8))
    return [(top.int(), logp) for top, logp in found]


def _logits(model: Any, ids: Tensor, batch_size: int) -> Iterator[Tensor]:
    """What is said about each token that was written, `(NEW, V)`, text after text."""
    for some in ids.to(next(model.parameters()).device).split(batch_size):
        yield from forward(model, some, torch.ones_like(some), keep=NEW + 1).logits[:, :-1]
