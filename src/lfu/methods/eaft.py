"""EAFT: tokens of which the model is sure pull less, so that the data don't overwrite what it knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lfu.methods.chunks import over_chunks
from lfu.methods.method import Batch, knob
from lfu.methods.token_loss import TokenLoss
from lfu.model.precision import wide


@dataclass
class EAFT(TokenLoss):
    """`w_t = (H_t / ln k)^alpha`, H_t the entropy of the model's k most likely next tokens, renormalised.

    Where the model is sure of another token than the label (a "confident conflict"), SFT's gradient is largest; EAFT's
    is small there, and near SFT's where the model does not know. LLaMA-Factory divides by 3.0, about ln 20; axolotl
    does not divide, which only scales the loss.
    """

    name: ClassVar[str] = "eaft"
    summary: ClassVar[str] = "each token's loss weighted by the model's entropy there"
    source: ClassVar[str] = "Diao et al. 2026, arXiv 2601.02151 (k 20, alpha 1; also in LLaMA-Factory and axolotl)"
    protects: ClassVar[str] = "what the model is sure of"

    top: int = knob(20, "tokens that the entropy is taken over (paper: 20)", low=2)
    alpha: float = knob(1.0, "exponent of the weight (paper: 1); 0 is SFT", low=0)

    def weights(self, nll: torch.Tensor, batch: Batch) -> torch.Tensor:
        logits_of = batch.trainer.anatomy.logits
        with torch.no_grad():
            return torch.cat(over_chunks(lambda h: entropy_weight(logits_of(h), self.top, self.alpha), batch.last))


def entropy_weight(logits: torch.Tensor, top: int, alpha: float) -> torch.Tensor:
    """`(N, V)` to w `(N,)` in [0, 1], in float32 or wider."""
    top = min(top, logits.shape[-1])
    log_p = wide(logits).topk(top, dim=-1).values.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (entropy / math.log(top)).clamp(0, 1) ** alpha
