"""SAM: the gradient is taken where the loss is worst nearby, so that flat minima win."""

import torch

from lfu.methods.method import Method, knob
from lfu.methods.run import Micro, Trainer
from lfu.model.rng import Replay
from lfu.parallel.one import OneProcess
from lfu.parallel.refusals import refuse_launch
from lfu.parallel.several import Several, several
from lfu.undesirable import Own, ascend

Gradients = list[torch.Tensor | None]


class SAM(Method):
    """`g = grad l(theta + rho * grad l(theta) / ||grad l(theta)||)`, one L2 norm over all of theta.

    The ascent is taken per micro-batch (m-sharpness, as in the paper's experiments) and both passes see the same
    dropout masks. Costs 2F+2B and one copy of theta and its gradient. The LfU paper's Table 6b.

    Under DDP the gradient of the ascent is summed over the processes (`ascent_scope="global"`: one more reduction of
    theta's gradient) or each climbs by its own (`local`, as SAM is often run).
    """

    name = "sam"
    summary = "sharpness-aware minimisation: gradient at the worst point nearby"
    source = "Foret et al. 2021, arXiv 2010.01412"
    protects = "generalisation, by flat minima"
    once = "one more copy of theta and of its gradient in memory"
    places = ("step",)
    whole_weights = True

    rho: float = knob(0.05, "radius of the ascent (paper: 0.05)", above=0)

    def setup(self, trainer: Trainer) -> None:
        refuse_launch(trainer)

    def training_step(self, trainer: Trainer, micro: Micro) -> torch.Tensor:
        place = Own()
        place.theta = theta = trainer.anatomy.theta()
        processes = OneProcess()
        if several(trainer):
            processes = Several(micro.model, trainer.args.ascent_scope, trainer.accelerator)
        replay = Replay(p.device for p in trainer.anatomy.model.parameters())
        earlier = _swapped(theta, [None] * len(theta))  # of the update's other micro-batches
        try:
            with processes.deferred():
                loss = micro.run()
        finally:  # the second backward adds to the earlier ones, and what a reducer sees is the sum
            gradients = _swapped(theta, earlier)
        gradients = processes.direction(gradients, theta)
        # nowhere to climb to, or fp16 overflow: theta stays, and the second pass is the first once more
        ascend(place, gradients, self.rho)
        del gradients
        try:
            with replay(), trainer.unmetered():
                worst = micro.run()
        finally:
            place.discard()
        trainer.log_metric("sam/worst_loss", float(worst) * micro.items / max(micro.tokens, 1))
        return loss


def _swapped(theta: list[torch.nn.Parameter], gradients: Gradients) -> Gradients:
    """Puts other gradients on theta, and returns those that were there."""
    there = [p.grad for p in theta]
    for p, g in zip(theta, gradients):
        p.grad = g
    return there
