"""Penalties on the hidden states themselves: L1 and L2, the LfU paper's Table 6c and 6d."""

from typing import Any, ClassVar

import torch

from lfu.methods.method import Method, knob
from lfu.methods.run import Batch, Trainer
from lfu.model.precision import wide


class FeaturePenalty(Method):
    """`l = l_SFT + weight * mean over answer tokens, layers 1..K and dimensions of rho(h - a)`.

    a = 0 (anchor = zero: small features), or the untouched model's h (anchor = start: features that stay). The LfU
    paper names such penalties without anchor or weight: both are knobs.
    """

    protects = "small features (or, with anchor=start, the features as they were)"
    places = ("penalty",)
    rho: ClassVar[Any]  # what is penalised of a tensor, elementwise

    weight: float = knob(0.01, "weight of the penalty (ours)", low=0)
    anchor: str = knob("zero", "towards zero, or start: the untouched model's (ours)", choices=("zero", "start"))

    def layers(self, depth: int) -> list[int]:
        return list(range(1, depth + 1))

    def check(self, args: Any) -> None:
        self.whole_weights = self.anchor == "start"
        super().check(args)

    def setup(self, trainer: Trainer) -> None:
        self.untouched = trainer.untouched if self.anchor == "start" else None

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        anchors = self.untouched.hidden(batch.inputs, batch.positions, list(batch.hidden)) if self.untouched else {}
        per_layer = []
        for layer, hidden in batch.hidden.items():
            features = wide(hidden) - anchors[layer] if anchors else wide(hidden)
            per_layer.append(batch.mean(self.rho(features).mean(-1)).to(loss.device))
        value = torch.stack(per_layer).mean()
        batch.log_mean(f"{self.name}/value", value)
        return loss + self.weight * value


class L1(FeaturePenalty):
    """`l = l_SFT + weight * mean |h - a|` over tokens, layers and dimensions; a = 0, or h of the untouched model."""

    name = "l1"
    summary = "L1 penalty on the hidden states"
    source = "a baseline of the LfU paper, arXiv 2511.13052, Table 6c"
    rho = staticmethod(torch.abs)
    protects = "sparse, small features (or, with anchor=start, the features as they were)"

    # as strong as l2's 0.01 on SmolLM2-135M-Instruct at the start: 0.2 to 0.3 of the SFT gradient's norm
    weight: float = knob(0.5, "weight of the penalty (ours)", low=0)


class L2(FeaturePenalty):
    """`l = l_SFT + weight * mean (h - a)^2` over tokens, layers and dimensions; a = 0, or h of the untouched model."""

    name = "l2"
    summary = "L2 penalty on the hidden states"
    source = "a baseline of the LfU paper, arXiv 2511.13052, Table 6d"
    rho = staticmethod(torch.square)
