"""Methods that weight the loss of each token: what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lfu.methods.chunks import over_chunks
from lfu.methods.method import Batch, Method
from lfu.methods.weights import refuse_sharding
from lfu.model.precision import wide


@dataclass
class TokenLoss(Method):
    """`l = (1/N) sum_t w_t * (- log p(y_t | x, y_<t))` over the N answer tokens; w_t is held constant.

    The logits are made a second time, from the last hidden states in chunks, as TRL's fused head keeps none.
    """

    places: ClassVar[tuple[str, ...]] = ("token loss",)

    def layers(self, depth: int) -> list[int]:
        return [depth]

    def setup(self, trainer: Any) -> None:
        refuse_sharding(trainer, self.name)

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        nll = token_nll(batch)
        weight = self.weights(nll.detach(), batch)
        batch.log_mean(f"{self.name}/weight", weight.sum() / batch.items)
        return (weight * nll).sum() / batch.items

    def weights(self, nll: torch.Tensor, batch: Batch) -> torch.Tensor:
        """w `(N,)` of the tokens whose loss is `nll` `(N,)`, in float32 or wider."""
        raise NotImplementedError


def token_nll(batch: Batch) -> torch.Tensor:
    """`- log p(y_t)` of each answer token: `(N,)` in float32 or wider, in the graph."""
    logits_of = batch.trainer.anatomy.logits
    return torch.cat(over_chunks(lambda h, y: nll_of(logits_of(h), y), batch.last, batch.targets))


def nll_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`(N, V)` and `(N,)` to `- log softmax(logits)[targets]`, `(N,)` in float32 or wider."""
    return -wide(logits).log_softmax(-1).gather(-1, targets[:, None].to(logits.device)).squeeze(-1)
