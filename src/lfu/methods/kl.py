"""KL to the untouched model on the training tokens: an anchor in the space of what the model says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lfu.methods.chunks import sum_over_chunks
from lfu.methods.method import Batch, Method, knob
from lfu.methods.weights import refuse_sharding
from lfu.model.precision import wide


@dataclass
class KL(Method):
    """`l = l_SFT + weight * (1/N) sum_t KL(r_t || p_t)`, next-token distributions: r the untouched model, p theta.

    direction = reverse takes `KL(p_t || r_t)`, as RLHF does. With a fresh LoRA theta the untouched model is the one
    with the adapter switched off: one more forward, no copy. With full theta a copy of the starting weights is kept.
    """

    name: ClassVar[str] = "kl"
    summary: ClassVar[str] = "KL to the untouched model on the same tokens"
    source: ClassVar[str] = "Li & Hoiem 2016, arXiv 1606.09282; weight as in ASFT, arXiv 2509.23753"
    protects: ClassVar[str] = "what the untouched model would have said to the training prompts"
    once: ClassVar[str] = "full theta: a copy of the starting weights in memory"
    places: ClassVar[tuple[str, ...]] = ("penalty",)

    weight: float = knob(0.05, "weight of the KL term (ASFT: 0.05)", low=0)
    direction: str = knob("forward", "forward KL(untouched || tuned), or reverse", choices=("forward", "reverse"))

    def layers(self, depth: int) -> list[int]:
        return [depth]

    def setup(self, trainer: Any) -> None:
        refuse_sharding(trainer, self.name)
        self.untouched = trainer.untouched

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        depth = max(batch.hidden)
        reference = self.untouched.hidden(batch.inputs, batch.positions, [depth])[depth]
        value = sum_over_chunks(lambda h, r: self._kl(batch, h, r), batch.last, reference) / batch.items
        batch.log_mean("kl/value", value)
        return loss + self.weight * value

    def _kl(self, batch: Batch, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        log_p = wide(batch.trainer.anatomy.logits(hidden)).log_softmax(-1)  # (n, V)
        log_r = wide(self.untouched.logits(reference)).log_softmax(-1)
        one, two = (log_r, log_p) if self.direction == "forward" else (log_p, log_r)
        return (one.exp() * (one - two)).sum()
