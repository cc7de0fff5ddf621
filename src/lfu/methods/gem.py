"""GEM: game-theoretic entropy maximisation in place of the cross-entropy, to keep the output distribution wide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lfu.methods.chunks import sum_over_chunks
from lfu.methods.method import Batch, Method, knob
from lfu.methods.weights import refuse_sharding
from lfu.model.precision import wide


@dataclass
class GEM(Method):
    """`l = (1/N) sum_t sum_v stop(q_v) w_v [log p_v - log p_y]`, y the label, p = softmax(z), q = softmax(z / beta).

    The cross-entropy pushes every other token down; GEM pushes down those alone that the model's own sharpened
    distribution q prefers to the label. w = 1 for h = linear; sigmoid(0.01 (z_v - z_y)) for h = logsigmoid.

    The value is not a likelihood and can be negative. The logits are made a second time, from the last hidden states
    in chunks, as TRL's fused head keeps none.
    """

    name: ClassVar[str] = "gem"
    summary: ClassVar[str] = "entropy-maximising game in place of the cross-entropy"
    source: ClassVar[str] = "Li et al., ICLR 2025, arXiv 2408.16673 (published loss: linear h, beta 0.7)"
    protects: ClassVar[str] = "the diversity of what the model says"
    places: ClassVar[tuple[str, ...]] = ("token loss",)

    beta: float = knob(0.7, "temperature of q, between 0 and 1 (paper: 0.7)", above=0, high=1)
    h: str = knob("linear", "the game's h (authors' scripts: linear)", choices=("linear", "logsigmoid"))

    def layers(self, depth: int) -> list[int]:
        return [depth]

    def setup(self, trainer: Any) -> None:
        refuse_sharding(trainer, self.name)

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        logits_of = batch.trainer.anatomy.logits
        chunk = lambda hidden, targets: gem_loss(logits_of(hidden), targets, self.beta, self.h).sum()
        return sum_over_chunks(chunk, batch.last, batch.targets) / batch.items


def gem_loss(logits: torch.Tensor, targets: torch.Tensor, beta: float = 0.7, h: str = "linear") -> torch.Tensor:
    """GEM's loss of each token.

    Args:
        logits: `(N, V)`; computed in float32 or wider.
        targets: `(N,)`, token ids.
        beta: temperature of q, in (0, 1].
        h: `linear` or `logsigmoid`.

    Returns:
        `(N,)`.
    """
    logits = wide(logits)
    label = targets[:, None].to(logits.device)
    with torch.no_grad():
        q = (logits / beta).softmax(-1)
        if h == "logsigmoid":
            q = q * torch.sigmoid(0.01 * (logits - logits.gather(-1, label)))
    log_p = logits.log_softmax(-1)
    return (q * (log_p - log_p.gather(-1, label))).sum(-1)
