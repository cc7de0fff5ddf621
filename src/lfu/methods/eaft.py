"""EAFT: tokens of which the model is sure pull less, so that the data don't overwrite what it knows."""

import math

import torch

from lfu.methods.knobs import knob
from lfu.methods.run import Batch
from lfu.methods.token_loss import WeightedLoss


class EAFT(WeightedLoss):
    """`w_t = (H_t / ln k)^alpha`, H_t the entropy of the model's k most likely next tokens, renormalised.

    Where the model is sure of another token than the label (a "confident conflict"), SFT's gradient is largest. EAFT's
    is small there, and near SFT's where the model does not know.
    """

    name = "eaft"
    summary = "each token's loss weighted by the model's entropy there"
    source = "Diao et al. 2026, arXiv 2601.02151 (k 20, alpha 1; also in LLaMA-Factory and axolotl)"
    protects = "what the model is sure of"

    top: int = knob(20, "number k of most likely tokens that the entropy is taken over (paper: 20)", low=2)
    alpha: float = knob(1.0, "exponent of the weight (paper: 1); 0 is SFT", low=0)

    @torch.no_grad()
    def weights(self, nll: torch.Tensor, batch: Batch) -> torch.Tensor:
        return batch.per_token(self._of)

    def _of(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        top = min(self.top, logits.shape[-1])
        log_p = logits.topk(top, dim=-1).values.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return (entropy / math.log(top)).clamp(0, 1) ** self.alpha
