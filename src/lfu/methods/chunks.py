"""Sums over tokens whose logits would not fit in memory all at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

ROWS = 256  # tokens whose logits (ROWS x V) are in memory at a time


def over_chunks(function: Callable[..., torch.Tensor], *tensors: torch.Tensor, rows: int = ROWS) -> list[torch.Tensor]:
    """`function` of up to `rows` rows of the tensors at a time, each recomputed in the backward.

    Args:
        function: also called with no rows, for a batch without tokens.
        tensors: each `(N, ...)`.
    """
    parts = zip(*(tensor.split(rows) for tensor in tensors))
    return [checkpoint(function, *part, use_reentrant=False) for part in parts]


def sum_over_chunks(function: Callable[..., torch.Tensor], *tensors: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """The sum of `over_chunks`, of a function to scalars."""
    return torch.stack(over_chunks(function, *tensors, rows=rows)).sum()
