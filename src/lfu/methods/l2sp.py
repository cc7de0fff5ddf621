"""L2-SP: a penalty on the distance from the weights where fine-tuning starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from lfu.methods.method import Batch, Method, knob
from lfu.methods.weights import lora_pairs, plain_theta, product_norm2, refuse_sharding
from lfu.model.precision import wide


@dataclass
class L2SP(Method):
    """`l + weight / 2 * ||theta - theta_start||^2`, on the weights that the model computes with. Once an update.

    With a LoRA theta that is `sum over layers ||s (B A - B0 A0)||_F^2`, exactly, by r x r products. Plain parameters
    (all weights, biases, `modules_to_save`, DoRA's magnitudes) enter with their own squared distance; so do the
    parameters of adapters other than LoRA.

    theta_start is the model as it is when the run is set up, also for a resumed one; it costs one copy of theta.
    The paper adds `beta / 2 ||w||^2` for a new head, which a language model doesn't get.
    """

    name: ClassVar[str] = "l2sp"
    summary: ClassVar[str] = "squared distance from the starting weights as a penalty"
    source: ClassVar[str] = "Li, Grandvalet, Davoine 2018, arXiv 1802.01483 (authors' script: 0.1)"
    protects: ClassVar[str] = "what the starting weights know"
    places: ClassVar[tuple[str, ...]] = ("penalty",)

    weight: float = knob(
        0.1, "weight of half the squared distance (authors' script: 0.1, their code's default 0.01)", low=0
    )

    def setup(self, trainer: Any) -> None:
        refuse_sharding(trainer, self.name)
        self._pairs = lora_pairs(trainer.anatomy)
        for pair in self._pairs:
            if pair.variant not in (None, "Dora"):
                raise ValueError(f"method 'l2sp' knows the weights of LoRA and DoRA, not of {pair.variant}")
        plain = plain_theta(trainer.anatomy, self._pairs)
        self._factor_starts = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in self._pairs]
        self._plain = [(p, p.detach().clone()) for p in plain.values()]

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        distance = self.squared_distance().to(loss.device)
        batch.trainer.log_metric("l2sp/squared_distance", float(distance.detach()))
        return loss + 0.5 * self.weight * batch.share * distance

    def squared_distance(self) -> torch.Tensor:
        """`||theta - theta_start||^2`: a scalar in float32 or wider, in the graph."""
        parts = [
            pair.scaling**2 * lora_squared_distance(pair.A, pair.B, *start)
            for pair, start in zip(self._pairs, self._factor_starts)
        ]
        # recomputed in the backward, lest all differences stay in memory until then
        parts += [
            checkpoint(_squared_distance, p, start, use_reentrant=False, preserve_rng_state=False)
            for p, start in self._plain
        ]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def lora_squared_distance(A: torch.Tensor, B: torch.Tensor, A0: torch.Tensor, B0: torch.Tensor) -> torch.Tensor:
    """`||B A - B0 A0||_F^2` without a product of full size.

    B A - B0 A0 = (B - B0) A + B0 (A - A0) = [B - B0, B0] [A; A - A0]: every term is small where the distance is, so
    that nothing cancels close to the start.

    Args:
        A, A0: `(r, in)`.
        B, B0: `(out, r)`.

    Returns:
        A scalar in float32 or wider.
    """
    A, B, A0, B0 = wide(A), wide(B), wide(A0), wide(B0)
    return product_norm2(torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0], dim=0))


def _squared_distance(p: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return (wide(p) - wide(start)).square().sum()
