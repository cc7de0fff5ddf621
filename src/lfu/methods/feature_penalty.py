"""Penalties on the hidden states themselves: what `l1` and `l2` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lfu.methods.method import Batch, Method, knob
from lfu.methods.weights import refuse_sharding
from lfu.model.precision import wide


@dataclass
class FeaturePenalty(Method):
    """`l = l_SFT + weight * mean over answer tokens, layers 1..K and dimensions of rho(h - a)`.

    a = 0 (anchor = zero: small features), or the untouched model's h (anchor = start: features that stay). The LfU
    paper names such penalties (Table 6c, d) without anchor or weight: both are knobs.
    """

    places: ClassVar[tuple[str, ...]] = ("penalty",)

    weight: float = knob(0.01, "weight of the penalty (none published)", low=0)
    anchor: str = knob("zero", "zero, or start: the untouched model's hidden states", choices=("zero", "start"))

    def layers(self, depth: int) -> list[int]:
        return list(range(1, depth + 1))

    def setup(self, trainer: Any) -> None:
        if self.anchor == "start":
            refuse_sharding(trainer, self.name)
        self.untouched = trainer.untouched if self.anchor == "start" else None

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        anchors = self.untouched.hidden(batch.inputs, batch.positions, list(batch.hidden)) if self.untouched else {}
        per_layer = []
        for layer, hidden in batch.hidden.items():
            features = wide(hidden) - anchors[layer] if anchors else wide(hidden)
            per_layer.append(self.size(features).mean(-1).sum().to(loss.device))
        value = torch.stack(per_layer).mean() / batch.items
        batch.log_mean(f"{self.name}/value", value)
        return loss + self.weight * value

    def size(self, features: torch.Tensor) -> torch.Tensor:
        """rho, elementwise."""
        raise NotImplementedError
