"""Micro-batches of rows, as the trainer would make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lfu.evaluation.pieces import answer_pieces
from lfu.study.rows import pair_of

Batch = dict[str, torch.Tensor]
IGNORED = -100


def answer_batches(tokenizer: Any, rows: Sequence[Mapping[str, Any]], size: int) -> list[Batch]:
    """Micro-batches of `size` rows in one of TRL's shapes, the loss on the answers."""
    pieces = answer_pieces(tokenizer, rows, render=pair_of)
    return padded([(piece.ids[: piece.start], piece.ids[piece.start :]) for piece in pieces], size)


def text_batches(tokenizer: Any, texts: Sequence[str], size: int) -> list[Batch]:
    """Micro-batches of `size` plain texts, the loss on all tokens."""
    return padded([([], tokenizer(text)["input_ids"]) for text in texts], size)


def padded(pairs: Sequence[tuple[list[int], list[int]]], size: int) -> list[Batch]:
    """Right-padded `input_ids`, `attention_mask`, `labels` `(size, T)` of pairs (prompt ids, answer ids)."""
    batches = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        width = max(len(prompt) + len(answer) for prompt, answer in part)
        batches.append({
            "input_ids": torch.tensor([_filled(p + a, 0, width) for p, a in part]),
            "attention_mask": torch.tensor([_filled([1] * len(p + a), 0, width) for p, a in part]),
            "labels": torch.tensor([_filled([IGNORED] * len(p) + a, IGNORED, width) for p, a in part]),
        })  # fmt: skip
    return batches


def tokens_of(batches: Sequence[Batch]) -> int:
    """How many tokens the loss of all micro-batches is over."""
    return sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)


def _filled(values: list[int], filler: int, width: int) -> list[int]:
    return values + [filler] * (width - len(values))
