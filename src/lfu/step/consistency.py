"""The consistency term (Eq. 5) and its siblings: how far the representations moved.

One class per kind, one shape: `(target, moving) -> (N,)`, a value per token. `target` is detached by the caller, the
gradient goes through `moving`. `Term` sums over tokens, layer by layer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lfu.model.anatomy import Anatomy
from lfu.model.precision import wide
from lfu.support.choices import one_of

Hidden = dict[int, torch.Tensor]  # layer -> (N, d)
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Autocast = Callable[[], AbstractContextManager[None]]
CHUNK = 2**24  # entries of one chunk of an N x N or N x V matrix: 64 MB in float32


class Consistency(nn.Module):
    """Base of the kinds below; an `nn.Module` of your own with the same call needs none of it.

    A `gradient`, `(target, moving) -> (N, d)` of the sum over tokens, is used in place of autograd where there is one.
    """

    reads: ClassVar[str] = "layers"  # representations `(N, d)`; or `logits` `(N, V)`
    token_sum: ClassVar[bool] = True  # a value depends on its token alone: rows may be taken one after the other
    settings: ClassVar[Mapping[str, str]] = {}  # the fields of `LfUConfig` that are its own, its arguments for them
    ignores: ClassVar[Sequence[str]] = ()  # the settings of the step that play no part with it


class MSE(Consistency):
    """`||h - h'||^2` over the hidden dimension d (Eq. 5).

    Args:
        reduction: `mean` over d, as in the authors' code (the paper's lambda = 5 belongs to it), or `sum`, as the
            paper's text has it; `sum` equals `mean` with lambda times d.
    """

    settings = {"mse_reduction": "reduction"}  # noqa: RUF012

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        one_of("mse_reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, d), (N, d) -> (N,)`."""
        squared = torch.linalg.vector_norm(wide(moving) - target, dim=-1).square()
        return squared / target.shape[-1] if self.reduction == "mean" else squared

    def gradient(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Of the sum over tokens with respect to `moving`, `(N, d)`: a fifth of the launches that autograd needs."""
        return (wide(moving) - target).mul_(2 / target.shape[-1] if self.reduction == "mean" else 2.0)


class Cosine(Consistency):
    """`1 - cos(h, h')`: the direction alone, whatever the norm."""

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, d), (N, d) -> (N,)`, each in [0, 2]."""
        return 1 - F.cosine_similarity(wide(moving), wide(target), dim=-1)


class Contrastive(Consistency):
    """InfoNCE over tokens: each h' must find its own h among those of the micro-batch.

    `-log( exp(cos(h'_i, h_i) / T) / sum_j exp(cos(h'_i, h_j) / T) )`

    Args:
        temperature: T > 0.
    """

    token_sum = False
    settings = {"temperature": "temperature"}  # noqa: RUF012

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
        self.temperature = temperature

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, d), (N, d) -> (N,)`; all pairs are formed, N x N a layer, in chunks of rows."""
        units = F.normalize(wide(target), dim=-1)
        own = torch.arange(len(target), device=target.device)

        def rows(moving: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            similarity = F.normalize(wide(moving), dim=-1) @ units.T
            return F.cross_entropy(similarity / self.temperature, own, reduction="none")

        return torch.cat(_in_chunks(rows, len(target), moving, own))


class LogitKL(Consistency):
    """`KL(softmax(z) || softmax(z'))` of the next-token distributions (Eq. 7)."""

    reads = "logits"
    ignores = ("layers", "final_norm", "random_layers")

    def forward(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """`(N, V), (N, V) -> (N,)`, in nats."""
        log_p = wide(target).log_softmax(-1)
        log_q = wide(moving).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


KINDS: dict[str, type[Consistency]] = {
    "mse": MSE, "cosine": Cosine, "contrastive": Contrastive, "logit_kl": LogitKL
}  # fmt: skip


def consistency_of(kind: str | nn.Module, **options: Any) -> nn.Module:
    """The consistency by its name, with its class's arguments; a module of your own passes through.

    Raises:
        ValueError: unknown name; an option outside its range.
    """
    if isinstance(kind, nn.Module):
        return kind
    one_of("consistency", kind, KINDS)
    return KINDS[kind](**options)


class Term:
    """Eq. 5 layer by layer: a consistency of the representations, or (Eq. 7) of what the head makes of them.

    `head_stays`: the auxiliary leaves the head as it is, so that clean logits `(N, V)` need not be kept.
    """

    def __init__(self, consistency: nn.Module, anatomy: Anatomy, head_stays: bool, autocast: Autocast):
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
            return {layer: _TokenSum.apply(moving[layer], target[layer], self.consistency) for layer in moving}
        return self.numbered({layer: self.per_token(target[layer], h).sum() for layer, h in moving.items()})

    def per_token(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Of one layer's h and h': values that add up to the sum over tokens."""
        if not self.reads_logits:
            return self.consistency(target, moving)
        vocabulary = self.anatomy.model.get_output_embeddings().weight.shape[0]
        return torch.stack(_in_chunks(self._logit_chunk, vocabulary, target, moving))

    def numbered(self, sums: Hidden) -> Hidden:
        """Logits count as layer K + 1."""
        return {layer + 1: value for layer, value in sums.items()} if self.reads_logits else sums

    def _logit_chunk(self, target: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        """Eq. 7 summed over a chunk of tokens, `(n, d)` h' and h (or the clean logits, see `target`)."""
        with self.autocast():
            logits = self.anatomy.logits(moving)
            if self.head_stays:
                with torch.no_grad():
                    target = self.anatomy.logits(target)
        return self.consistency(target, logits).sum()


class _TokenSum(torch.autograd.Function):
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
        if analytic := getattr(ctx.consistency, "gradient", None):
            return analytic(target, moving).mul_(gradients[0]).to(moving.dtype), None, None
        return value_and_gradient(ctx.consistency, target, moving, gradients[0])[1], None, None


def value_and_gradient(
    consistency: Distance, target: torch.Tensor, moving: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over tokens, and its gradient `(N, d)` with respect to `moving`, times `scale`."""
    with torch.enable_grad():
        leaf = moving.detach().requires_grad_()
        value = consistency(target, leaf.view_as(leaf)).sum()  # a view: FlopCounterMode can't watch a leaf here
    (gradient,) = torch.autograd.grad(value, leaf, scale)
    return value.detach(), gradient


def _in_chunks(piece: Any, width: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """`piece(*rows)` over chunks of rows of `tensors`, so many that rows x width stays below `CHUNK`.

    Several chunks are each computed again in the backward: one is in memory at a time.
    """
    rows = max(1, CHUNK // width)
    if len(tensors[0]) <= rows:
        return [piece(*tensors)]
    pieces = zip(*(t.split(rows) for t in tensors))
    return [checkpoint(piece, *some, use_reentrant=False, preserve_rng_state=False) for some in pieces]


def displacement(clean: Hidden, moved: Hidden) -> dict[int, float]:
    """Layer -> ||h' - h|| / ||h||, read off the device at once."""
    norm = lambda tensor: torch.linalg.vector_norm(tensor, dtype=wide(tensor[:0]).dtype)
    device = next(iter(clean.values())).device
    with torch.no_grad():
        ratios = [(norm(moved[layer] - h) / norm(h)).to(device) for layer, h in clean.items()]
    return dict(zip(clean, torch.stack(ratios).tolist()))
