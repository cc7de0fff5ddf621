"""PSFT: PPO's clipped ratio in place of the cross-entropy, so that no token is pushed far at once."""

from collections.abc import Mapping

import torch

from lfu.methods.knobs import knob
from lfu.methods.run import Batch, Trainer
from lfu.methods.token_loss import TokenLoss
from lfu.methods.tokens import in_pieces, nll_of
from lfu.methods.untouched import Untouched
from lfu.methods.weights import named_theta, take_back


class PSFT(TokenLoss):
    """`l = - (1/N) sum_t min(r_t, 1 + clip)`, `r_t = p(y_t) / p_old(y_t)`: PPO's objective with advantage 1.

    p_old is the model at the newest update number divisible by `updates`, kept as a copy of theta. Where r = 1 the
    gradient is SFT's, and a token that has become 1 + clip times as likely since then pulls no more. The source's lower
    clip (0.2) has no effect where the advantage is positive. Costs one more forward. The value is about -1 and not a
    likelihood: compare evaluation losses.
    """

    name = "psft"
    summary = "proximal SFT: a clipped probability ratio in place of the cross-entropy"
    source = "Zhu et al. 2025, arXiv 2508.17784 (authors' script: clip 0.28, 8 updates)"
    protects = "the output distribution, by small steps"
    once = "a copy of theta in memory"

    clip: float = knob(0.28, "a token pulls until it is 1 + clip times as likely (authors' script: 0.28)", above=0)
    updates: int = knob(8, "updates with the same old model (authors' script: 256 / 32 rows = 8)", low=1)

    def setup(self, trainer: Trainer) -> None:
        self._theta = named_theta(trainer.anatomy)
        self._old = Untouched(trainer.model, trainer.anatomy, copied=True)

    def of_tokens(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            old = in_pieces(lambda h, y: nll_of(self._old.logits(h), y), self._old.last(batch), batch.targets)
        ratio = (old - batch.per_token(nll_of)).exp()
        batch.log_mean("psft/clipped", batch.mean(ratio.detach() > 1 + self.clip))
        return -ratio.clamp(max=1 + self.clip)

    def after_update(self, trainer: Trainer) -> None:
        if trainer.state.global_step % self.updates == 0:
            self.load_state_dict(self._theta)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: self._old.start[id(p)] for name, p in self._theta.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        take_back(state, self.state_dict(), "old model")
