"""Fine-tuning many runs at once: base models times draws of rows, one setting, AdamW on a linear schedule to zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from testbed.gradients import AnchorBatch, Batch, Gradient, fixed_weights, token_losses
from testbed.graphs import repeat
from testbed.llama import FINAL, Weights, hidden_states
from testbed.setting import Setting
from testbed.theta import AllWeights, LoRAWeights, Tensors, Theta, norm, per_run, plus, ratio

CLIP, EPSILON = 1.0, 1e-8  # of the gradient's norm; Adam's
ANCHORS = 4  # rows of anchor text a step
PERPLEXITY = 2.5  # tokens that the untouched model finds less likely are left out by STM
DECAY = 0.95  # of the moving average that L2-SP may pull towards
OLD = 8  # updates with the same old model (PSFT)


@dataclass
class Material:
    """What the runs of one setting are made of; S runs.

    Args:
        start: weights before fine-tuning, `(S, ...)`.
        ids, answer: the training rows of each run, `(S, rows, T)`.
        order: which rows a step takes, `(steps, S, B)`.
        anchor: text of the untouched model, `(S, rows, T)`, or None.
        old: rows of the old skills and where their answers are, `(S, rows, T)` each, or None.
        fisher: diagonal of Fisher's matrix at the start, mean 1 a run, or None.
    """

    start: Weights
    ids: torch.Tensor
    answer: torch.Tensor
    order: torch.Tensor
    anchor: torch.Tensor | None = None
    old: tuple[torch.Tensor, torch.Tensor] | None = None
    fisher: Weights | None = None


class Run:
    """The state of all runs, and one update of it. No value reaches Python, so that a CUDA graph can hold it."""

    def __init__(self, setting: Setting, material: Material, lam: float | None = None):
        self.setting, self.material = setting, material
        self.theta: Theta = (LoRAWeights if setting.lora else AllWeights)(material.start)
        self.gradient = Gradient(setting, self.theta, lam)
        self.optimizer = Adam(self.theta.tensors, 0.9, 0.999)
        self.step = torch.zeros(1, dtype=torch.long, device=material.ids.device)
        self.sizes = torch.zeros_like(material.start[FINAL][:, 0])  # the gradients' norms so far, summed
        self.average = [t.clone() for t in self.theta.tensors] if setting.pull_kind == "average" else []
        self.old = [t.clone() for t in self.theta.tensors] if setting.weighting == "psft" else []
        self.reference = self._says(material.ids) if setting.kl else None
        self.weights = self._settled() if setting.weighting in ("flow", "stm") else None
        self.anchored = self._anchored() if setting.anchor else None

    @property
    def state(self) -> Tensors:
        """Every tensor that an update changes."""
        theta = [*self.theta.tensors, *self.average, *self.old]
        return [self.step, self.sizes, *theta, *self.gradient.state, *self.optimizer.state]

    def train(self) -> Weights:
        """All updates; returns the weights."""
        repeat(self.update, self.setting.steps, self.state)
        return fixed_weights(self.theta)

    def update(self) -> None:
        """One step of every run."""
        left = 1 - self.step.to(self.theta.tensors[0].dtype) / self.setting.steps  # (1,)
        gradient, _ = self.gradient(self._batch(), self._anchors())
        with torch.no_grad():
            gradient = self._pulled(gradient, left)
            clip(gradient)
            gradient = self._drawn(gradient, 1 - left)
            rate = self.setting.rate * left
            if self.setting.pull_kind == "decoupled":
                self._draw_back(rate, 1 - left)
            self.optimizer(self.theta.tensors, gradient, rate)
            for mean, t in zip(self.average, self.theta.tensors):
                mean.lerp_(t, 1 - DECAY)
            self.step += 1

    # -- what a step sees ----------------------------------------------------------------------------------------------

    def _batch(self) -> Batch:
        rows = self.material.order.index_select(0, self.step)[0]
        ids, answer = _take(self.material.ids, rows), _take(self.material.answer, rows)
        reference, weight = (None if t is None else _take(t, rows) for t in (self.reference, self.weights))
        if self.old:
            weight = self._old_says(ids)
        if self.setting.replay and self.material.old is not None:
            count = round(rows.shape[1] * self.setting.replay / (1 - self.setting.replay))
            which = self._next(self.material.old[0], count)
            old_ids, old_answer = (_take(t, which) for t in self.material.old)
            ids, answer = torch.cat([ids, old_ids], 1), torch.cat([answer, old_answer], 1)
        return Batch(ids, answer, reference, weight)

    def _next(self, pool: torch.Tensor, count: int) -> torch.Tensor:
        """The next `count` rows of a pool, in its order, round and round: `(S, count)`."""
        one = (self.step * count + torch.arange(count, device=pool.device)) % pool.shape[1]
        return one.expand(len(pool), -1)

    def _anchors(self) -> AnchorBatch | None:
        if self.anchored is None:
            return None
        which = self._next(self.anchored.ids, ANCHORS)
        reference = self.anchored.reference
        if self.setting.anchor_on == "hidden":
            taken = _take(reference.transpose(1, 2), which).transpose(1, 2)
        else:
            taken = _take(reference, which)
        return AnchorBatch(_take(self.anchored.ids, which), _take(self.anchored.counts, which), taken)

    @torch.no_grad()
    def _says(self, ids: torch.Tensor) -> torch.Tensor:
        """The untouched model's log-probabilities, `(S, rows, T - 1, V)`."""
        return torch.cat([
            token_losses(self.material.start, hidden_states(self.material.start, part)[-1], part)[1]
            for part in ids.split(32, 1)
        ], 1)  # fmt: skip

    @torch.no_grad()
    def _old_says(self, ids: torch.Tensor) -> torch.Tensor:
        """The NLL of a batch under PSFT's old model, which is renewed every few updates: `(S, B, T - 1)`."""
        for kept, now in zip(self.old, self.theta.tensors):
            kept.copy_(torch.where(self.step % OLD == 0, now, kept))
        weights, _ = self.theta.weights(self.old)
        return token_losses(weights, hidden_states(weights, ids)[-1], ids)[0]

    @torch.no_grad()
    def _settled(self) -> torch.Tensor:
        """Weights of the training tokens that follow from the untouched model's loss on them: `(S, rows, T - 1)`."""
        ids, answer = self.material.ids, self.material.answer[:, :, 1:]
        nll = -self._says(ids).gather(-1, ids[:, :, 1:, None])[..., 0]
        if self.setting.weighting == "stm":
            return (nll <= math.log(PERPLEXITY)).to(nll.dtype)
        means = (nll * answer).sum(-1) / answer.sum(-1)
        return (-means / means.median(1, keepdim=True).values).exp()[:, :, None].expand_as(nll)

    @torch.no_grad()
    def _anchored(self) -> AnchorBatch:
        ids = self.material.anchor
        assert ids is not None
        counts = ids[:, :, 1:] != 0
        if self.setting.anchor_on == "hidden":
            hidden = hidden_states(self.material.start, ids)
            return AnchorBatch(ids, counts, torch.stack([h[:, :, :-1] for h in hidden], 1))
        return AnchorBatch(ids, counts, self._says(ids))

    # -- L2-SP and its relatives ---------------------------------------------------------------------------------------

    def _distances(self) -> Tensors:
        """theta - theta_0; of a LoRA the gradient of half the product's squared distance, not of A's and B's."""
        start, names = self.material.start, self.theta.names
        if self.setting.lora:
            weights = self.theta.weights()[0]
            return self.theta.chain([weights[name] - start[name] for name in names])
        if self.average:
            return [t - mean for t, mean in zip(self.theta.tensors, self.average)]
        distances = [t - start[name] for name, t in zip(names, self.theta.tensors)]
        if self.material.fisher is not None:
            return [d * self.material.fisher[name] for name, d in zip(names, distances)]
        return distances

    def _pulled(self, gradient: Tensors, left: torch.Tensor) -> Tensors:
        """With a fixed weight: a part of the loss, so that it is clipped with the rest."""
        s = self.setting
        if s.pull_kind in ("decoupled", "current") or not s.pull:
            return gradient
        weight = s.pull * (left if s.pull_kind == "fading" else torch.ones_like(left))
        return plus(gradient, self._distances(), weight.expand(len(gradient[0])))

    def _drawn(self, gradient: Tensors, done: torch.Tensor) -> Tensors:
        """At a share of the clipped gradient: `weight="auto"`, which grows with the run, or of this very gradient."""
        s = self.setting
        if not s.share or s.pull_kind == "decoupled":
            return gradient
        size, distances = norm(gradient), self._distances()
        self.sizes += size
        if s.pull_kind != "current":
            size = done * self.sizes / (self.step + 1)
        return plus(gradient, distances, s.share * ratio(size, norm(distances)))

    def _draw_back(self, rate: torch.Tensor, done: torch.Tensor) -> None:
        """Beside Adam, as AdamW decays weights; with a share, in units of what Adam moves a weight in one step."""
        s, distances = self.setting, self._distances()
        weight = torch.full_like(self.sizes, s.pull)
        if s.share:
            numbers = sum(d[0].numel() for d in distances)
            weight = s.share * ratio(done * numbers**0.5 * torch.ones_like(weight), norm(distances))
        for t, d in zip(self.theta.tensors, distances):
            t.sub_(per_run(rate * weight, d) * d)


class Adam:
    """AdamW's arithmetic by torch's own function, with its state in the open, so that a CUDA graph can be reset."""

    def __init__(self, tensors: Tensors, beta1: float, beta2: float, decay: float = 0.0):
        self.betas, self.decay = (beta1, beta2), decay
        self.first, self.second = ([torch.zeros_like(t) for t in tensors] for _ in range(2))
        self.counts = [torch.zeros((), dtype=torch.float32, device=t.device) for t in tensors]

    @property
    def state(self) -> Tensors:
        """Its moments and counts."""
        return [*self.first, *self.second, *self.counts]

    def __call__(self, tensors: Tensors, gradient: Tensors, rate: torch.Tensor) -> None:
        """One step of each tensor; `rate` is `(1,)`."""
        gradient = [g.contiguous() for g in gradient]  # the fused kernel walks through memory, not through indices
        adamw(
            tensors, gradient, self.first, self.second, [], self.counts, fused=True, amsgrad=False,
            beta1=self.betas[0], beta2=self.betas[1], lr=rate.squeeze(0), weight_decay=self.decay, eps=EPSILON,
            maximize=False,
        )  # fmt: skip


def clip(gradient: Tensors) -> None:
    """In place, each run's gradient to a norm of 1 at most, as `clip_grad_norm_` does."""
    factor = (CLIP / (norm(gradient) + 1e-6)).clamp(max=1.0)
    for g in gradient:
        g.mul_(per_run(factor, g))


def _take(pool: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`(S, N, ...)` and `(S, B)` -> `(S, B, ...)`."""
    return pool[torch.arange(len(pool), device=pool.device)[:, None], rows]


@torch.no_grad()
def scores(weights: Weights, ids: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per run and row: NLL of the answer (nats a token), and whether greedy decoding gives exactly the answer.

    Greedy decoding gives the answer just when every answer token is the likeliest after those before it: one forward.

    Args:
        ids, answer: `(N, T)`, the same for every run, or `(S, N, T)`.

    Returns:
        `(S, N)` both.
    """
    runs = len(next(iter(weights.values())))
    if ids.dim() == 2:
        ids, answer = ids.expand(runs, -1, -1), answer.expand(runs, -1, -1)
    nll, right = [], []
    for part, marked in zip(ids.split(100, 1), answer.split(100, 1)):
        losses, log_p = token_losses(weights, hidden_states(weights, part)[-1], part)
        wanted = marked[:, :, 1:]
        nll.append((losses * wanted).sum(-1) / wanted.sum(-1))
        right.append(((log_p.argmax(-1) == part[:, :, 1:]) | ~wanted).all(-1))
    return torch.cat(nll, 1), torch.cat(right, 1)


@torch.no_grad()
def drawn_back(setting: Setting, start: Weights, tuned: Weights) -> Weights:
    """After training: the weights between the untouched and the tuned ones (WiSE-FT, LiNeS)."""
    if setting.trained == setting:
        return tuned
    layers = 1 + max(int(name.split(".")[2]) for name in tuned if name.startswith("model.layers."))

    def kept(name: str) -> float:
        place = int(name.split(".")[2]) / (layers - 1) if name.startswith("model.layers.") else 0.0
        return setting.wise * (setting.lines + (1 - setting.lines) * place)

    return {name: torch.lerp(start[name], w, kept(name)) for name, w in tuned.items()}


@torch.no_grad()
def change(start: Weights, weights: Weights, linear: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """How far each run moved: `moved`, the norm over all weights, and `rank`, the effective rank of the change.

    The effective rank is `(sum s_i^2)^2 / sum s_i^4` over the singular values of a layer's change, the mean over
    layers: 1 if the change is an outer product, n if it is the same in n directions.
    """
    delta = {name: weights[name] - start[name] for name in weights}
    ranks = []
    for name, d in delta.items():
        if linear(name):
            small = torch.bmm(d, d.transpose(1, 2)) if d.shape[1] <= d.shape[2] else torch.bmm(d.transpose(1, 2), d)
            ranks.append(d.square().sum((1, 2)).square() / small.square().sum((1, 2)).clamp_min(1e-30))
    return {"moved": norm(list(delta.values())), "rank": torch.stack(ranks).mean(0)}
