"""Eq. 5 over tokens and layers: a consistency of the representations, or (Eq. 7) of what the head makes of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from lfu.model.anatomy import Anatomy
from lfu.model.precision import wide
from lfu.step.consistency import TokenSum, in_chunks

Hidden = dict[int, torch.Tensor]  # layer -> (N, d)


class Term:
    """The consistency, layer by layer.

    Args:
        consistency: of `(N, d), (N, d)`, or, where it `reads` logits, of `(N, V), (N, V)`.
        anatomy: the model's parts.
        head_stays: the auxiliary leaves the head as it is, so that clean logits `(N, V)` need not be kept.
        autocast: as in `LfUStep`.
    """

    def __init__(
        self,
        consistency: nn.Module,
        anatomy: Anatomy,
        head_stays: bool,
        autocast: Callable[[], AbstractContextManager[None]],
    ):
        self.consistency, self.anatomy, self.head_stays, self.autocast = consistency, anatomy, head_stays, autocast
        self.reads_logits = getattr(consistency, "reads", "layers") == "logits"

    def target(self, clean: Hidden) -> Hidden:
        """What h' is compared with: h, or, where the ascent may move the head too, the clean logits `(N, V)`."""
        if not self.reads_logits or self.head_stays:
            return clean
        with torch.no_grad(), self.autocast():
            return {layer: self.anatomy.logits(h) for layer, h in clean.items()}

    def sums(self, target: Hidden, moving: Hidden) -> Hidden:
        """Layer -> the consistency summed over tokens, a scalar in the graph of `moving`."""
        if not self.reads_logits:
            return {layer: TokenSum.apply(moving[layer], target[layer], self.consistency) for layer in moving}
        pieces = {n: in_chunks(self._logit_piece, self._vocabulary, target[n], h) for n, h in moving.items()}
        return self.numbered({layer: torch.stack(some).sum() for layer, some in pieces.items()})

    def per_token(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Of one layer's h and h': values that add up to the sum over tokens."""
        if not self.reads_logits:
            return self.consistency(target, moving)
        return torch.stack(in_chunks(self._logit_piece, self._vocabulary, target, moving))

    def numbered(self, sums: Hidden) -> Hidden:
        """Logits count as layer K + 1."""
        return {layer + 1: value for layer, value in sums.items()} if self.reads_logits else sums

    @property
    def _vocabulary(self) -> int:
        return self.anatomy.model.get_output_embeddings().weight.shape[0]

    def _logit_piece(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Eq. 7 summed over a chunk of tokens, `(n, d)` h' and h (or the clean logits, see `target`)."""
        with self.autocast():
            logits = self.anatomy.logits(moving)
            if self.head_stays:
                with torch.no_grad():
                    target = self.anatomy.logits(target)
        return self.consistency(target, logits).sum()


def displacement(clean: Hidden, moved: Hidden) -> dict[int, float]:
    """Layer -> ||h' - h|| / ||h||, read off the device at once."""
    device = next(iter(clean.values())).device
    with torch.no_grad():
        ratios = [(_norm(moved[layer] - h) / _norm(h)).to(device) for layer, h in clean.items()]
    return dict(zip(clean, torch.stack(ratios).tolist()))


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=wide(tensor[:0]).dtype)
