"""PSFT: PPO's clipped ratio in place of the cross-entropy, so that no token is pushed far at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lfu.methods.method import Batch, Method, knob
from lfu.methods.token_loss import nll_of, token_nll
from lfu.methods.untouched import Untouched
from lfu.methods.weights import named_theta, refuse_sharding


@dataclass
class PSFT(Method):
    """`l = - (1/N) sum_t min(r_t, 1 + clip)`, `r_t = p(y_t) / p_old(y_t)`: PPO's objective with advantage 1.

    p_old is the model at the newest update number divisible by `updates`, kept as a copy of theta; where r = 1 the
    gradient is SFT's times p / p_old = 1, and a token that has become 1 + clip times as likely since then pulls no
    more. The source's lower clip (0.2) has no effect where the advantage is positive. Costs one more forward.
    The value is about -1 and not a likelihood: compare evaluation losses.
    """

    name: ClassVar[str] = "psft"
    summary: ClassVar[str] = "proximal SFT: a clipped probability ratio in place of the cross-entropy"
    source: ClassVar[str] = "Zhu et al. 2025, arXiv 2508.17784 (authors' script: clip 0.28, 8 updates)"
    protects: ClassVar[str] = "the output distribution, by small steps"
    once: ClassVar[str] = "a copy of theta in memory"
    places: ClassVar[tuple[str, ...]] = ("token loss",)

    clip: float = knob(0.28, "a token pulls until it is 1 + clip times as likely (authors' script: 0.28)", above=0)
    updates: int = knob(8, "updates with the same old model (authors' script: 256 / 32 rows = 8)", low=1)

    def layers(self, depth: int) -> list[int]:
        return [depth]

    def setup(self, trainer: Any) -> None:
        refuse_sharding(trainer, self.name)
        self._theta = named_theta(trainer.anatomy)
        self._old = Untouched(trainer.model, trainer.anatomy, copied=True)

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        nll = token_nll(batch)
        with torch.no_grad():
            depth = max(batch.hidden)
            hidden = self._old.hidden(batch.inputs, batch.positions, [depth])[depth]
            pairs = zip(hidden.split(256), batch.targets.split(256))
            old = torch.cat([nll_of(self._old.logits(h), y) for h, y in pairs])
        ratio = (old - nll).exp()
        batch.log_mean("psft/clipped", (ratio.detach() > 1 + self.clip).sum() / batch.items)
        return -ratio.clamp(max=1 + self.clip).sum() / batch.items

    def after_update(self, trainer: Any) -> None:
        if trainer.state.global_step % self.updates == 0:
            for p in self._theta.values():
                self._old.start[id(p)].copy_(p.detach())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: self._old.start[id(p)] for name, p in self._theta.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        if state.keys() != self._theta.keys():
            raise ValueError("the checkpoint's old model is of other weights: resume with the run's own settings")
        for name, value in state.items():
            self._old.start[id(self._theta[name])].copy_(value)
