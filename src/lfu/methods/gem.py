"""GEM: game-theoretic entropy maximisation in place of the cross-entropy, to keep the output distribution wide."""

import torch

from lfu.methods.knobs import knob
from lfu.methods.run import Batch
from lfu.methods.token_loss import TokenLoss


class GEM(TokenLoss):
    """`l = (1/N) sum_t sum_v stop(q_v) w_v [log p_v - log p_y]`, y the label, p = softmax(z), q = softmax(z / beta).

    The cross-entropy pushes every other token down. GEM pushes down only those that the model's own sharpened
    distribution q prefers to the label. w = 1 for h = linear, and sigmoid(0.01 (z_v - z_y)) for h = logsigmoid.
    The value is not a likelihood and can be negative.
    """

    name = "gem"
    summary = "entropy-maximising game in place of the cross-entropy"
    source = "Li et al., ICLR 2025, arXiv 2408.16673 (published loss: linear h, beta 0.7)"
    protects = "the diversity of what the model says"

    beta: float = knob(0.7, "temperature of q (paper: 0.7)", above=0, high=1)
    h: str = knob("linear", "form of the game, see above (authors' scripts: linear)", choices=("linear", "logsigmoid"))

    def of_tokens(self, batch: Batch) -> torch.Tensor:
        return batch.per_token(self._of)

    def _of(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        label = targets[:, None]
        with torch.no_grad():
            q = (logits / self.beta).softmax(-1)
            if self.h == "logsigmoid":
                q = q * torch.sigmoid(0.01 * (logits - logits.gather(-1, label)))
        log_p = logits.log_softmax(-1)
        return (q * (log_p - log_p.gather(-1, label))).sum(-1)
