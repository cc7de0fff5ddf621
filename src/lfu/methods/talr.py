"""TALR: hard tokens pull less, by how hard they are beside the rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lfu.methods.examples import example_of, means_by
from lfu.methods.method import Batch, knob
from lfu.methods.token_loss import TokenLoss


@dataclass
class TALR(TokenLoss):
    """`w_t = max(exp(-l_t / tau), floor)`, l_t the token's loss, tau the median of the rows' mean losses.

    The batch is the micro-batch. With an even number of rows the median is the lower one of the middle two.
    """

    name: ClassVar[str] = "talr"
    summary: ClassVar[str] = "each token's loss weighted by how easy it is now"
    source: ClassVar[str] = "Lin et al. 2025, arXiv 2509.20758 (tau: median of the batch; floor 0.01)"
    protects: ClassVar[str] = "what the model knows against tokens that it finds hard"

    floor: float = knob(0.01, "smallest weight (paper: 0.01)", low=0, high=1)

    def weights(self, nll: torch.Tensor, batch: Batch) -> torch.Tensor:
        if not len(nll):
            return nll
        tau = means_by(example_of(batch.inputs, batch.positions), nll).median()
        return (-nll / tau.clamp_min(torch.finfo(nll.dtype).tiny)).exp().clamp_min(self.floor)
