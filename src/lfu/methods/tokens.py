"""Single tokens: their loss, the likeliest of them, and logits made in pieces that fit into memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lfu.model.anatomy import Anatomy
from lfu.model.precision import wide
from lfu.model.representations import Reader, answer_positions

ROWS = 256  # tokens whose logits are in memory at a time


def nll_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`(N, V)` and `(N,)` to `- log softmax(logits)[targets]`, `(N,)` in float32 or wider."""
    return -wide(logits).log_softmax(-1).gather(-1, targets[:, None].to(logits.device)).squeeze(-1)


def likeliest_tokens(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most likely tokens `(..., k)`, most likely first, and their log-probabilities in float32; on the CPU."""
    best = wide(logits).log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return best.indices.cpu(), best.values.float().cpu()


def kl_of_top(logits: torch.Tensor, top: torch.Tensor, log_r: torch.Tensor) -> torch.Tensor:
    """`sum_i r_i (log r_i - log p_i)` over the tokens `top` and all others as one: at most the KL over all (nats).

    Logits `(N, V)` of p, token ids `(N, k)`, and float32 log-probabilities `(N, k)` of r to `(N,)`, float32 or wider.
    """
    top, log_r = top.to(logits.device), log_r.to(logits.device)
    log_p = wide(logits).log_softmax(-1).gather(-1, top)
    r, tiny = log_r.exp(), torch.finfo(log_p.dtype).tiny
    known = (r * (log_r - log_p)).sum(-1)
    rest = 1 - r.sum(-1)
    rest = torch.where(rest > 1e-5, rest, 0)  # below that it is rounding
    rest_p = (1 - log_p.exp().sum(-1)).clamp_min(tiny)
    return known + torch.where(rest > 0, torch.special.xlogy(rest, rest) - rest * rest_p.log(), 0)


def in_pieces(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of `ROWS` rows of the tensors `(N, ...)` at a time, recomputed in the backward: `(N,)`."""
    pieces = zip(*(tensor.split(ROWS) for tensor in tensors))
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])


def read_last(anatomy: Anatomy, batch: Mapping[str, Any], **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward over a batch `(B, T)`, of which M tokens are labelled; read as `Reader.reading` has it.

    Returns `(M, d)`: what the head reads to predict them; `(M,)`: their flat places.
    """
    reader, positions = Reader(anatomy, [len(anatomy.blocks)]), answer_positions(batch["labels"])
    with reader.reading(positions, **how) as hidden:
        reader.run(batch)
    (last,) = hidden.values()
    return last, positions + 1
