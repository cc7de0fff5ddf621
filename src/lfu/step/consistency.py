"""The consistency term (Eq. 5) and its siblings: how far the representations moved.

One class a kind, one shape: `(target, moving) -> (N,)`, a value a token. `target` is detached by the caller, the
gradient goes through `moving`. The mean over answer tokens and layers is taken in step.py. `token_sum`: a token's
value depends on that token alone, so rows may be taken one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lfu.model.precision import wide
from lfu.support.choices import one_of


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
        """`(N, d), (N, d) -> (N,)`; all pairs are formed, N x N a layer, in chunks of rows."""
        units = F.normalize(wide(target), dim=-1)
        own = torch.arange(len(target), device=target.device)

        def rows(moving: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            similarity = F.normalize(wide(moving), dim=-1) @ units.T
            return F.cross_entropy(similarity / self.temperature, own, reduction="none")

        return torch.cat(in_chunks(rows, len(target), moving, own))


class LogitKL(nn.Module):
    """`KL(softmax(z) || softmax(z'))` of the next-token distributions (Eq. 7). The layer range plays no part."""

    reads = "logits"
    token_sum = True

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, V), (N, V) -> (N,)`, in nats."""
        log_p = wide(target).log_softmax(-1)
        log_q = wide(moving).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


# Entries of one chunk of an N x N or N x V matrix: 64 MB in float32.
CHUNK = 2**24


Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TokenSum(torch.autograd.Function):
    """The sum over tokens of a consistency of representations, `(N, d), (N, d) -> ()`.

    Keeps what is there anyway, the two tensors in their own dtype, and takes the gradient anew in the backward: the
    float32 copies of one layer live at a time, not those of all K.
    """

    @staticmethod
    def forward(ctx: Any, moving: torch.Tensor, target: torch.Tensor, consistency: nn.Module) -> torch.Tensor:
        ctx.save_for_backward(moving, target)
        ctx.consistency = consistency
        return consistency(target, moving).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        moving, target = ctx.saved_tensors
        return gradient_of(ctx.consistency, target, moving, gradients[0])[1], None, None


def gradient_of(
    consistency: Distance, target: torch.Tensor, moving: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over tokens, and its gradient `(N, d)` with respect to `moving`, times `scale`."""
    with torch.enable_grad():
        leaf = moving.detach().requires_grad_()
        value = consistency(target, leaf.view_as(leaf)).sum()  # a view: FlopCounterMode can't watch a leaf here
    (gradient,) = torch.autograd.grad(value, leaf, scale)
    return value.detach(), gradient


def in_chunks(piece: Any, width: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """`piece(*rows)` over chunks of rows of `tensors`, so many that rows x width stays below `CHUNK`.

    Several chunks are each computed again in the backward: one is in memory at a time.
    """
    rows = max(1, CHUNK // width)
    if len(tensors[0]) <= rows:
        return [piece(*tensors)]
    pieces = zip(*(t.split(rows) for t in tensors))
    return [checkpoint(piece, *some, use_reentrant=False, preserve_rng_state=False) for some in pieces]


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
