"""FLOW: rows that the untouched model finds easy count more."""

import torch

from lfu.methods.examples import examples_of, losses_before_training
from lfu.methods.knobs import knob
from lfu.methods.run import Batch, Trainer
from lfu.methods.token_loss import WeightedLoss


class FLOW(WeightedLoss):
    """`w_i = exp(-f_i / tau)` for all tokens of row i, f_i its mean loss before training, tau the median of all f_i.

    The weights are set once, from one forward over the training rows, and are at most 1. A row is known by its tokens.
    """

    name = "flow"
    summary = "rows weighted by how easy they are for the untouched model"
    source = "Sanyal et al., ICML 2025, arXiv 2502.02797 (tau: the median)"
    protects = "what the untouched model does well"
    once = "before training, one forward over the training rows"

    temperature: float = knob(1.0, "tau as a multiple of the median loss (paper: 1)", above=0)

    def setup(self, trainer: Trainer) -> None:
        means = {key: nll.nanmean() for key, nll in losses_before_training(trainer, self.name).items()}
        losses = torch.tensor([float(mean) for mean in means.values() if not mean.isnan()])
        tau = self.temperature * losses.median() if len(losses) else 1.0
        self._weight = {key: float((-mean / tau).exp()) for key, mean in means.items()}
        least, middle, most = losses.quantile(torch.tensor([0, 0.5, 1])) if len(losses) else [torch.nan] * 3
        trainer.say(
            f"flow: {len(losses):,} different rows, losses before training {least:.2f} to {most:.2f} nats per token, "
            f"median {middle:.2f}"
        )

    def weights(self, nll: torch.Tensor, batch: Batch) -> torch.Tensor:
        of_position = nll.new_ones(batch.inputs["input_ids"].numel())
        for key, place in examples_of(batch.inputs):
            of_position[place] = self._weight.get(key, 1.0)
        return of_position[batch.positions]
