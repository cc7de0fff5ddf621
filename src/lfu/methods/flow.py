"""FLOW: rows that the untouched model finds easy count more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lfu.methods.examples import examples_of, key_of, nll_before_training
from lfu.methods.method import Batch, knob
from lfu.methods.token_loss import TokenLoss


@dataclass
class FLOW(TokenLoss):
    """`w_i = exp(-f_i / tau)` for all tokens of row i, f_i its mean loss before training, tau the median of all f_i.

    The weights are set once, from one forward over the training rows, and are at most 1: the paper does not normalise
    them either, and Adam does not see their scale. A row is known by its tokens.
    """

    name: ClassVar[str] = "flow"
    summary: ClassVar[str] = "rows weighted by how easy they are for the untouched model"
    source: ClassVar[str] = "Sanyal et al., ICML 2025, arXiv 2502.02797 (tau: the median)"
    protects: ClassVar[str] = "what the untouched model does well"
    once: ClassVar[str] = "before training, one forward over the training rows"

    temperature: float = knob(1.0, "tau as a multiple of the median loss (paper: 1)", above=0)

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        means: dict[bytes, float] = {}
        for row, nll in zip(trainer.train_dataset, nll_before_training(trainer, self.name)):
            ids = torch.tensor(row["input_ids"])
            for part in torch.arange(len(ids)).split(row.get("seq_lengths") or len(ids)):
                if len(part):
                    means[key_of(ids[part])] = float(nll[part].nanmean())
        losses = torch.tensor([mean for mean in means.values() if mean == mean])
        tau = self.temperature * float(losses.median()) if len(losses) else 1.0
        self._weight = {key: float(torch.tensor(-mean / tau).exp()) for key, mean in means.items()}
        trainer.say(f"flow: {len(losses):,} different rows, losses before training {_range(losses)} nats per token")

    def weights(self, nll: torch.Tensor, batch: Batch) -> torch.Tensor:
        of_position = nll.new_ones(batch.inputs["input_ids"].numel())
        for key, place in examples_of(batch.inputs):
            of_position[place] = self._weight.get(key, 1.0)
        return of_position[batch.positions]


def _range(losses: torch.Tensor) -> str:
    return f"{losses.min():.2f} to {losses.max():.2f}, median {losses.median():.2f}" if len(losses) else "of none"
