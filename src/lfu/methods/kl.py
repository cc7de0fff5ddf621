"""KL to the untouched model on the training tokens: an anchor in the space of what the model says. And ASFT."""

from typing import Any, ClassVar

import torch

from lfu.methods.method import Method, knob
from lfu.methods.run import Batch, Trainer
from lfu.model.precision import wide


class KL(Method):
    """`l = l_SFT + weight * (1/N) sum_t KL(r_t || p_t)`, next-token distributions: r the untouched model, p theta.

    direction = reverse takes `KL(p_t || r_t)`, as RLHF does. With a fresh LoRA theta the untouched model is the one
    with the adapter switched off: one more forward, no copy. With full theta a copy of the starting weights is kept.
    """

    name = "kl"
    summary = "KL to the untouched model on the same tokens"
    source = "Li & Hoiem 2016, arXiv 1606.09282; weight as in ASFT, arXiv 2509.23753"
    protects = "what the untouched model would have said to the training prompts"
    once = "full theta: a copy of the starting weights in memory"
    places: ClassVar[tuple[str, ...]] = ("penalty",)
    whole_weights = True

    weight: float = knob(0.05, "weight of the KL term (ASFT: 0.05)", low=0)
    direction: str = knob(
        "forward", "forward: KL(untouched || tuned) (ASFT); or reverse", choices=("forward", "reverse")
    )

    def layers(self, depth: int) -> list[int]:
        return [depth]

    def setup(self, trainer: Trainer) -> None:
        self.untouched = trainer.untouched

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        value = batch.mean(batch.per_token(self._of, self.untouched.last(batch)))
        batch.log_mean("kl/value", value)
        return loss + self.weight * value

    def _of(self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        log_p = logits.log_softmax(-1)  # (n, V)
        log_r = wide(self.untouched.logits(reference)).log_softmax(-1)
        one, two = (log_r, log_p) if self.direction == "forward" else (log_p, log_r)
        return (one.exp() * (one - two)).sum(-1)


class ASFT(KL):
    """`l = - (1/N) sum_t stop(p_t) log p_t + weight * (1/N) sum_t KL(r_t || p_t)`, r the untouched model.

    `dft` and `kl` together, as `method="dft+kl"` is; see those two. LLaMA-Factory's weight is 0.1.
    """

    name = "asft"
    summary = "dft with a KL to the untouched model"
    source = "Zhu et al. 2025, arXiv 2509.23753 (weight 0.05)"
    protects = "what the model knows against answers that it finds unlikely"
    places = ("token loss", "penalty")
    never_with = {"kl": "asft has the same term already"}  # noqa: RUF012 (declared in Method)

    def configure(self, args: Any) -> None:
        args.loss_type = "dft"
