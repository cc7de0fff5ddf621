"""L2-SP: a penalty on the distance from the weights where fine-tuning starts."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lfu.methods.knobs import refuse_idle
from lfu.methods.method import Method, knob
from lfu.methods.run import Batch, Trainer
from lfu.methods.weights import lora_pairs, plain_theta, product_norm2
from lfu.model.precision import wide
from lfu.model.tensors import global_norm

UPDATES = 60  # of a run that `share` is said for; docs/results-pull.md tells why it falls with their root


class L2SP(Method):
    """`l + weight / 2 * ||theta - theta_start||^2`, on the weights that the model computes with. Once per update.

    With a LoRA theta the distance is `sum over layers ||s (B A - B0 A0)||_F^2`, exactly, by r x r products. Plain
    parameters (all weights, biases, `modules_to_save`, DoRA's magnitudes, other adapters) enter with their
    own squared distance. theta_start is the model as it is when the run is set up, also for a resumed one; it costs one
    copy of theta.

    With `weight="auto"`, before update t of T the pull is added to the gradient g with the norm
    `share * sqrt(60 / T) * (t / T) * (mean norm of g so far)`: the longer it acts, the weaker it must be. g is the
    gradient of everything else, as the optimizer would see it.

    `decoupled` moves the weights themselves, `theta <- theta - lr * weight * (theta - theta_start)` before each step of
    the optimizer, past Adam's scaling. There auto means a pull whose root mean square over the weights is
    `share * (t / T)` learning rates. A fresh LoRA's B is what shrinks.
    """

    name = "l2sp"
    summary = "a pull back to the starting weights: their squared distance as a penalty"
    source = "Li, Grandvalet, Davoine 2018, arXiv 1802.01483; auto and decoupled are ours"
    protects = "what the starting weights know"
    places = ("penalty",)
    whole_weights = True

    weight: str | float = knob("auto", "weight of half the squared distance (ours: auto; authors: 0.1)", low=0)
    share: float = knob(
        0.1,
        "weight=auto: the pull over the data's gradient after 60 updates; in longer runs less (ours)",
        above=0,
    )
    decoupled: bool = knob(False, "pull the weights directly, past Adam, as AdamW's weight decay does (ours)")
    schedule: str = knob("constant", "decay: the pull falls to zero over the run (ours)", choices=("constant", "decay"))

    def __post_init__(self) -> None:
        refuse_idle(self, "share", by="weight")

    def setup(self, trainer: Trainer) -> None:
        if self.weight == "auto" and trainer.accelerator.scaler is not None and not trainer.args.max_grad_norm:
            raise ValueError(
                f"{self.name}.weight=auto in float16 reads unscaled gradients: set max_grad_norm, or use bf16"
            )
        pairs = lora_pairs(trainer.anatomy)
        for pair in pairs:
            if pair.variant not in (None, "Dora"):
                raise ValueError(f"method 'l2sp' knows the weights of LoRA and DoRA, not of {pair.variant}")
            if self.decoupled and pair.B.any():
                raise ValueError(
                    f"l2sp.decoupled draws a LoRA's B towards zero, and {pair.name} does not start there: "
                    "start a fresh adapter, or leave decoupled off"
                )
        self._pairs = [(pair, (pair.A.detach().clone(), pair.B.detach().clone())) for pair in pairs]
        self._plain = [(p, p.detach().clone()) for p in plain_theta(trainer.anatomy, pairs).values()]
        self._gradients = torch.zeros(2, dtype=torch.float64)  # sum of the norms of g, and their number

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        if self.weight == "auto" or self.decoupled:
            return loss
        distance = self.squared_distance().to(loss.device)
        batch.trainer.log_metric(f"{self.name}/squared_distance", float(distance.detach()))
        return loss + 0.5 * float(self.weight) * self._fall(batch.trainer.state) * batch.share * distance

    def before_update(self, trainer: Trainer) -> None:
        if self.weight != "auto" and not self.decoupled:
            return
        norm = global_norm([p.grad for p in trainer.anatomy.theta()])
        if not (math.isfinite(norm) and norm > 0):  # this update is left out
            return
        self._gradients += torch.tensor([norm, 1.0], dtype=torch.float64)
        steps = max(trainer.state.max_steps, 1)
        done = trainer.state.global_step / steps
        if self.decoupled:
            self._draw_back(trainer, done)
            return
        length = _length(pull for _, pull in self._pulls())
        share = self.share * math.sqrt(UPDATES / steps) * done * self._fall(trainer.state)
        weight = share * float(self._gradients[0] / self._gradients[1])
        weight = weight / length if length > 0 else 0.0
        for p, pull in self._pulls():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.add_(pull.to(p.grad.dtype), alpha=weight)
        trainer.log_metric(f"{self.name}/weight", weight)

    def stretched(self, p: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The pull on a plain parameter that has changed by `change`: in the metric of the distance."""
        return change

    def _part(self, p: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        change = wide(p) - wide(start)
        return (self.stretched(p, change) * change).sum()

    def _pull(self, p: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return self.stretched(p, wide(p.detach()) - wide(start))

    def _fall(self, state: Any) -> float:
        return 1.0 if self.schedule == "constant" else 1 - state.global_step / max(state.max_steps, 1)

    def _pulls(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each parameter with its part of the gradient of `||theta - theta_start||^2 / 2`, one in memory at a time."""
        for pair, start in self._pairs:
            trained = [factor for factor in (pair.A, pair.B) if factor.requires_grad]
            half = 0.5 * pair.scaling**2 * lora_squared_distance(pair.A, pair.B, *start)
            yield from zip(trained, torch.autograd.grad(half, trained))
        yield from ((p, self._pull(p, start)) for p, start in self._plain)

    @torch.no_grad()
    def _draw_back(self, trainer: Trainer, done: float) -> None:
        """One decoupled step towards the start; a fresh LoRA's product shrinks with its B."""
        moved = [(pair.B, start) for pair, (_, start) in self._pairs] + self._plain
        weight = self.weight
        if weight == "auto":
            length = _length(self._pull(p, start) for p, start in moved)
            weight = self.share * done * math.sqrt(sum(p.numel() for p, _ in moved)) / length if length > 0 else 0.0
        weight = float(weight) * self._fall(trainer.state)
        for p, start in moved:
            p.sub_((self._pull(p, start) * weight * trainer.optimizer.param_groups[0]["lr"]).to(p.dtype))
        trainer.log_metric(f"{self.name}/weight", weight)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"gradients": self._gradients.clone()} if self.weight == "auto" else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._gradients.copy_(state["gradients"])

    def squared_distance(self) -> torch.Tensor:
        """`||theta - theta_start||^2`: a scalar in float32 or wider, in the graph."""
        parts = [pair.scaling**2 * lora_squared_distance(pair.A, pair.B, *start) for pair, start in self._pairs]
        # recomputed in the backward, lest all differences stay in memory until then
        recomputed = partial(checkpoint, self._part, use_reentrant=False, preserve_rng_state=False)
        parts += [recomputed(p, start) for p, start in self._plain]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def lora_squared_distance(A: torch.Tensor, B: torch.Tensor, A0: torch.Tensor, B0: torch.Tensor) -> torch.Tensor:
    """`||B A - B0 A0||_F^2`, A `(r, in)` and B `(out, r)`, without a product of full size; float32 or wider.

    B A - B0 A0 = (B - B0) A + B0 (A - A0) = [B - B0, B0] [A; A - A0]: every term is small where the distance is, so
    that nothing cancels close to the start.
    """
    A, B, A0, B0 = wide(A), wide(B), wide(A0), wide(B0)
    return product_norm2(torch.cat([B - B0, B0], dim=1), torch.cat([A, A - A0], dim=0))


def _length(pulls: Iterable[torch.Tensor]) -> float:
    """The norm over all of them together; one is in memory at a time."""
    norms = [torch.linalg.vector_norm(pull) for pull in pulls]
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))
