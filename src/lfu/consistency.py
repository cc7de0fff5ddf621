"""The consistency term (Eq. 5) and its siblings: how far the representations moved.

One class a kind, one shape: `(target, moving) -> (N,)`, a value a token. `target` is detached by the caller, the
gradient goes through `moving`. The mean over answer tokens and layers is taken in objective.py. `token_sum`: a token's
value depends on that token alone, so rows may be taken one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lfu.choices import one_of
from lfu.precision import wide


class MSE(nn.Module):
    """`||h - h'||^2` over the hidden dimension d (Eq. 5).

    Args:
        reduction: `mean` over d, as in the authors' code (the paper's lambda = 5 belongs to it), or `sum`, as the
            paper's text has it; `sum` equals `mean` with lambda times d.
    """

    reads = "layers"
    token_sum = True

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}: use 'mean' or 'sum'")
        self.reduction = reduction

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, d), (N, d) -> (N,)`."""
        squared = (wide(moving) - wide(target)).square()
        return squared.mean(-1) if self.reduction == "mean" else squared.sum(-1)


class Cosine(nn.Module):
    """`1 - cos(h, h')`: the direction alone, whatever the norm."""

    reads = "layers"
    token_sum = True

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, d), (N, d) -> (N,)`, each in [0, 2]."""
        return 1 - F.cosine_similarity(wide(moving), wide(target), dim=-1)


class Contrastive(nn.Module):
    """InfoNCE over tokens: each h' must find its own h among those of the micro-batch.

    `-log( exp(cos(h'_i, h_i) / T) / sum_j exp(cos(h'_i, h_j) / T) )`

    Args:
        temperature: T > 0.
    """

    reads = "layers"
    token_sum = False

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be > 0")
        self.temperature = temperature

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, d), (N, d) -> (N,)`; all pairs are formed, N x N a layer."""
        similarity = F.normalize(wide(moving), dim=-1) @ F.normalize(wide(target), dim=-1).T
        return F.cross_entropy(
            similarity / self.temperature, torch.arange(len(target), device=target.device), reduction="none"
        )


class LogitKL(nn.Module):
    """`KL(softmax(z) || softmax(z'))` of the next-token distributions (Eq. 7). The layer range plays no part."""

    reads = "logits"
    token_sum = True

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, V), (N, V) -> (N,)`, in nats."""
        log_p = wide(target).log_softmax(-1)
        log_q = wide(moving).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


KINDS = {"mse": MSE, "cosine": Cosine, "contrastive": Contrastive, "logit_kl": LogitKL}


def consistency_of(kind: str | nn.Module, *, reduction: str = "mean", temperature: float = 0.1) -> nn.Module:
    """The consistency by its name; a module of your own (with `reads`) passes through.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(kind, nn.Module):
        return kind
    one_of("consistency", kind, KINDS)
    options: dict[str, dict[str, Any]] = {"mse": {"reduction": reduction}, "contrastive": {"temperature": temperature}}
    return KINDS[kind](**options.get(kind, {}))
