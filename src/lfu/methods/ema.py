"""EMA: the moving average of the weights over training is what is kept."""

from collections.abc import Mapping
from typing import Any

import torch

from lfu.methods.method import Method, knob
from lfu.methods.run import Trainer
from lfu.methods.weights import named_theta, take_back
from lfu.model.precision import wide


class EMA(Method):
    """`m_t = d_t m_{t-1} + (1 - d_t) theta_t`, `m_0` the start, `d_t = min(decay, (1 + t) / (10 + t))`; m_T is kept.

    The warm-up of d makes m_T, until d reaches `decay`, an average over roughly the last tenth of the run, however
    short. m is kept in float32 where theta is narrower, on theta's device. Training, evaluation during training and
    checkpoints see theta; m lies beside the checkpoints. With a LoRA theta A and B are averaged one by one.
    """

    name = "ema"
    summary = "exponential moving average of the weights, kept at the end"
    source = "Tarvainen and Valpola 2017, arXiv 1703.01780 (decay 0.99, then 0.999); warm-up: TensorFlow's"
    protects = "against the noise of the last steps"
    places = ("final weights",)
    whole_weights = True

    decay: float = knob(0.999, "largest decay (the paper: 0.99 at first, then 0.999)", low=0, high=1)
    warmup: bool = knob(True, "the decay of update t is at most (1 + t) / (10 + t), as in TensorFlow")

    def __post_init__(self) -> None:
        if self.decay == 1 and not self.warmup:
            raise ValueError("ema.decay=1 with ema.warmup=false keeps the untouched model: lower the decay")

    def configure(self, args: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end and method 'ema' both decide which weights are kept: drop one")

    def setup(self, trainer: Trainer) -> None:
        self._theta = named_theta(trainer.anatomy)
        self.average = {name: wide(p.detach()).clone() for name, p in self._theta.items()}

    def decay_at(self, update: int) -> float:
        """d_t of update t = 1, 2, ..."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def after_update(self, trainer: Trainer) -> None:
        decay = self.decay_at(trainer.state.global_step)
        for name, p in self._theta.items():
            self.average[name].lerp_(wide(p), 1 - decay)

    @torch.no_grad()
    def finish(self, trainer: Trainer) -> None:
        for name, p in self._theta.items():
            p.copy_(self.average[name])
        trainer.say("ema: kept the moving average of the weights")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        take_back(state, self.average, "moving average")
