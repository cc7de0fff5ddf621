"""The loss of single tokens: hidden states read, and logits made of them in pieces that fit into memory."""

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


def in_pieces(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of `ROWS` rows of the tensors `(N, ...)` at a time, recomputed in the backward: `(N,)`."""
    pieces = zip(*(tensor.split(ROWS) for tensor in tensors))
    return torch.cat([checkpoint(function, *piece, use_reentrant=False) for piece in pieces])


def read_last(anatomy: Anatomy, batch: Mapping[str, Any], **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward over a batch `(B, T)`, of which M tokens are labelled.

    Args:
        how: to read, as `Reader.reading` has it.

    Returns:
        `(M, d)`: what the head reads to predict them; `(M,)`: their flat places.
    """
    reader, positions = Reader(anatomy, [len(anatomy.blocks)]), answer_positions(batch["labels"])
    with reader.reading(positions, **how) as hidden:
        reader.run(batch)
    (last,) = hidden.values()
    return last, positions + 1
