"""EWC: the pull to the starting weights, stronger on those that matter to what the untouched model says."""

from typing import Any

import torch
from peft import PeftType

from lfu.evaluation.batching import evaluating
from lfu.methods.knobs import knob
from lfu.methods.l2sp import L2SP
from lfu.methods.own_text import own_text
from lfu.methods.run import Preparation, Trainer
from lfu.methods.tokens import nll_of, read_last
from lfu.model.precision import wide


class EWC(L2SP):
    """`l + weight / 2 * sum_i F_i (theta_i - theta_start_i)^2`, F the diagonal of the Fisher information, of mean 1.

    `F_i = E[(d log p(x) / d theta_i)^2]` over texts x that the untouched model wrote itself (those of `anchor`): the
    definition asks for data drawn from the model, and of the old task, which the paper has, there are none here. It is
    divided by its mean over theta, so that `weight` has the scale of l2sp's; `auto`, `share`, `decoupled` and
    `schedule` are l2sp's. Single weights are weighed, so it takes full weights (or a part of them), not LoRA.
    """

    name = "ewc"
    summary = "elastic weight consolidation: l2sp with each weight's pull scaled by its Fisher information"
    source = "Kirkpatrick et al. 2017, arXiv 1612.00796; on the model's own text, for want of old data"
    protects = "the weights that matter most for what the model says"
    once = "before training, texts generated and a backward for each; two more copies of theta in memory"

    texts: int = knob(64, "how many texts the model writes for the Fisher information (ours)", low=1)
    tokens: int = knob(64, "length of the longest text, in tokens that the model chooses (ours)", low=2)

    def check_adapter(self, config: Any, *, further: bool = False) -> None:
        if config is not None and config.peft_type == PeftType.LORA:
            raise ValueError("method 'ewc' weighs single weights: train all weights (--use_peft false), or use l2sp")

    def adapter(self, config: Any, run: Preparation) -> Any:
        self.said = own_text(run, self, top=1)
        return config

    def setup(self, trainer: Trainer) -> None:
        self.check_adapter(getattr(trainer.model, "active_peft_config", None))
        super().setup(trainer)
        self._fisher = self._information(trainer)

    def stretched(self, p: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return self._fisher[id(p)] * change

    def _information(self, trainer: Trainer) -> dict[int, torch.Tensor]:
        """id of a parameter -> its F, in float32 or wider."""
        anatomy, theta = trainer.anatomy, trainer.anatomy.theta()
        total = [torch.zeros_like(wide(p.detach())) for p in theta]
        with evaluating(trainer.model), trainer.compute_loss_context_manager():
            for row in range(self.texts):
                batch = self.said.batch(slice(row, row + 1), anatomy.device)
                hidden, places = read_last(anatomy, batch, detach=False)
                nll = nll_of(anatomy.logits(hidden), batch["labels"].flatten()[places]).sum()
                for sum_, g in zip(total, torch.autograd.grad(nll, theta, allow_unused=True)):
                    if g is not None:
                        sum_.add_(wide(g).square())
        mean = sum(float(t.sum()) for t in total) / sum(t.numel() for t in total)
        if not mean > 0:
            raise ValueError("method 'ewc': the model's own texts say nothing about its weights: give more ewc.texts")
        return {id(p): sum_ / mean for p, sum_ in zip(theta, total)}
