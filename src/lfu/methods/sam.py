"""SAM: the gradient is taken where the loss is worst nearby, so that flat minima win."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lfu.methods.method import Method, Micro, knob
from lfu.methods.weights import refuse_sharding
from lfu.model.rng import Replay
from lfu.model.tensors import global_norm
from lfu.parallel.one import OneProcess
from lfu.parallel.refusals import refuse_launch
from lfu.parallel.several import of_trainer, several


@dataclass
class SAM(Method):
    """`g = grad l(theta + rho * grad l(theta) / ||grad l(theta)||)`, one L2 norm over all of theta.

    The ascent is taken per micro-batch (m-sharpness, as in the paper's experiments) and both passes see the same
    dropout masks. Costs 2F+2B and one copy of theta and its gradient. The LfU paper's Table 6b.

    Under DDP the gradient of the ascent is summed over the processes (`ascent_scope="global"`: one more reduction of
    theta's gradient) or each climbs by its own (`local`, as SAM is often run).
    """

    name: ClassVar[str] = "sam"
    summary: ClassVar[str] = "sharpness-aware minimisation: gradient at the worst point nearby"
    source: ClassVar[str] = "Foret et al. 2021, arXiv 2010.01412"
    protects: ClassVar[str] = "generalisation, by flat minima"
    once: ClassVar[str] = "one more copy of theta and of its gradient in memory"
    places: ClassVar[tuple[str, ...]] = ("step",)

    rho: float = knob(0.05, "radius of the ascent (paper: 0.05)", above=0)

    def setup(self, trainer: Any) -> None:
        refuse_launch(trainer)
        refuse_sharding(trainer, self.name)

    def training_step(self, trainer: Any, micro: Micro) -> torch.Tensor:
        theta = trainer.anatomy.theta()
        processes = of_trainer(trainer, micro.model) if several(trainer) else OneProcess()
        earlier = _take_gradients(theta)  # of the update's other micro-batches
        replay = Replay(p.device for p in trainer.anatomy.model.parameters())
        try:
            with processes.deferred():
                loss = micro.run()
            gradients = processes.direction(_take_gradients(theta), theta)
        finally:
            _give(theta, earlier)  # the second backward adds to them, and what a reducer sees is the sum
        norm = global_norm(gradients)
        # nowhere to climb to, or fp16 overflow: the second pass is the first once more
        length = self.rho / norm if norm > 0 and math.isfinite(norm) else 0.0
        with _moved(theta, gradients, length), replay(), trainer.unmetered():
            del gradients
            worst = micro.run()
        trainer.log_metric("sam/worst_loss", float(worst) * micro.items / max(micro.tokens, 1))
        return loss


def _take_gradients(theta: list[torch.nn.Parameter]) -> list[torch.Tensor | None]:
    taken = [p.grad for p in theta]
    _give(theta, [None] * len(theta))
    return taken


def _give(theta: list[torch.nn.Parameter], gradients: list[torch.Tensor | None]) -> None:
    for p, g in zip(theta, gradients):
        p.grad = g


@contextmanager
def _moved(theta: list[torch.nn.Parameter], along: list[torch.Tensor | None], length: float) -> Iterator[None]:
    """Inside, theta + length * along; afterwards theta as it was, to the bit."""
    kept = [p.detach().clone() for p in theta]
    try:
        with torch.no_grad():
            for p, g in zip(theta, along):
                if g is not None and length:
                    p.add_(g.to(p.dtype), alpha=length)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(theta, kept):
                p.copy_(old)
