"""TALR: hard tokens pull less, by how hard they are beside the rows of the batch."""

import torch

from lfu.methods.examples import example_of, means_by
from lfu.methods.knobs import knob
from lfu.methods.run import Batch
from lfu.methods.token_loss import WeightedLoss


class TALR(WeightedLoss):
    """`w_t = max(exp(-l_t / tau), floor)`, l_t the token's loss, tau the median of the rows' mean losses.

    The batch is the micro-batch. With an even number of rows the median is the lower one of the middle two.
    """

    name = "talr"
    summary = "each token's loss weighted by how easy it is now"
    source = "Lin et al. 2025, arXiv 2509.20758 (tau: median of the batch; floor 0.01)"
    protects = "what the model knows against tokens that it finds hard"

    floor: float = knob(0.01, "smallest weight (paper: 0.01)", low=0, below=1)

    def weights(self, nll: torch.Tensor, batch: Batch) -> torch.Tensor:
        if not len(nll):
            return nll
        tau = means_by(example_of(batch.inputs, batch.positions), nll).median()
        return (-nll / tau.clamp_min(torch.finfo(nll.dtype).tiny)).exp().clamp_min(self.floor)
