"""The gradient of one update, for every method: many runs at once, each with its own rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from testbed.llama import EMBEDDING, Weights, hidden_states, is_linear, logits
from testbed.setting import Setting
from testbed.theta import SCALING, Tensors, Theta, norm, per_run, plus, random_factor, ratio

TOP = 20  # tokens that EAFT takes the entropy over
PROXIMAL = 0.28  # PSFT: a token pulls until it is 1 + so much times as likely as under the old model
START, RATE = 1e-4, 0.2  # of LfU's lam x alpha / strength before a ratio was seen; of the running mean of ratios


class Batch(NamedTuple):
    """Rows of one update, right-padded.

    `reference` is what the untouched model says at positions that predict: log-probabilities `(S, B, T - 1, V)`;
    `weight` what a token's loss is weighted with, where that was settled before training; of PSFT the old model's NLL.
    """

    ids: torch.Tensor  # (S, B, T)
    answer: torch.Tensor  # (S, B, T), true where a loss is taken
    reference: torch.Tensor | None = None
    weight: torch.Tensor | None = None  # (S, B, T - 1)


class AnchorBatch(NamedTuple):
    """Text of the untouched model, and what it says there: log-probabilities, or hidden states of all layers."""

    ids: torch.Tensor  # (S, B, T)
    counts: torch.Tensor  # (S, B, T - 1), true where it is compared
    reference: torch.Tensor  # (S, B, T - 1, V), or (S, layers, B, T - 1, d)


def token_losses(weights: Weights, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token NLL `(S, B, T - 1)`, and the log-probabilities `(S, B, T - 1, V)` it is read off."""
    log_p = logits(weights, hidden[:, :, :-1]).log_softmax(-1)
    return -log_p.gather(-1, ids[:, :, 1:, None])[..., 0], log_p


def mean_where(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean of `(S, ...)` where true, `(S,)`."""
    return (values * where).flatten(1).sum(1) / where.flatten(1).sum(1)


def kl(reference: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """`KL(reference || p)` a position."""
    return (reference.exp() * (reference - log_p)).sum(-1)


@dataclass
class Gradient:
    """The gradient of theta on a batch, as `setting` says, and the loss.

    LfU's lam follows the gradient ratio as `lam="auto"` of the package does: `mean_log` and `seen` are its state.
    """

    setting: Setting
    theta: Theta
    lam: float | None = None  # fixed instead of held at setting.strength
    state: Tensors = field(init=False)

    def __post_init__(self) -> None:
        like = self.theta.tensors[0]
        self.state = [like.new_zeros(len(like)), like.new_zeros(len(like))]

    def __call__(self, batch: Batch, anchor: AnchorBatch | None = None) -> tuple[Tensors, torch.Tensor]:
        s = self.setting
        weights, leaves = self.theta.weights()
        vectors = self._zero_vectors(weights) if s.auxiliary == "steering" else []
        objective, loss, hidden = self._objective(weights, batch, anchor, vectors or None)
        found = torch.autograd.grad(objective.sum(), leaves + vectors)
        by_leaf, by_vector = list(found[: len(leaves)]), list(found[len(leaves) :])
        gradient = self.theta.chain(by_leaf)
        if s.rho:
            length = ratio(torch.full_like(loss, s.rho), norm(gradient))
            moved = plus(self.theta.tensors, gradient, length)
            weights, leaves = self.theta.weights(moved)
            objective = self._objective(weights, batch, anchor, None)[0]
            gradient = self.theta.chain(torch.autograd.grad(objective.sum(), leaves), moved)
        if s.auxiliary:
            targets = [h.detach() for h in hidden]
            extra = self._consistency(batch, targets, gradient, by_leaf, by_vector)
            lam = self._held(norm(gradient), norm(extra)) if self.lam is None else torch.full_like(loss, self.lam)
            gradient = plus(gradient, extra, lam)
        return gradient, loss.detach()

    def _objective(
        self, weights: Weights, batch: Batch, anchor: AnchorBatch | None, steering: Tensors | None
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        """What is differentiated `(S,)`, SFT's loss in it `(S,)`, and the hidden states."""
        s = self.setting
        hidden = hidden_states(weights, batch.ids, steering)
        nll, log_p = token_losses(weights, hidden[-1], batch.ids)
        wanted = batch.answer[:, :, 1:]
        loss = mean_where(nll, wanted)
        objective = self._weighted(nll, log_p.detach(), batch) if s.weighting else loss
        if s.kl and batch.reference is not None:
            objective = objective + s.kl * mean_where(kl(batch.reference, log_p), wanted)
        if s.anchor and anchor is not None:
            objective = objective + s.anchor * self._anchored(weights, anchor)
        return objective, loss, hidden

    def _weighted(self, nll: torch.Tensor, log_p: torch.Tensor, batch: Batch) -> torch.Tensor:
        """SFT's loss with a weight a token."""
        wanted, held = batch.answer[:, :, 1:], nll.detach()
        if batch.weight is not None:
            if self.setting.weighting == "psft":
                return -mean_where((batch.weight - nll).exp().clamp(max=1 + PROXIMAL), wanted)
            if self.setting.weighting == "stm":  # the mean over the tokens that are left
                left = batch.weight * wanted
                return (nll * left).flatten(1).sum(1) / left.flatten(1).sum(1).clamp_min(1)
            weight = batch.weight
        elif self.setting.weighting == "dft":
            weight = (-held).exp()
        elif self.setting.weighting == "eaft":
            top = log_p.topk(TOP, dim=-1).values.log_softmax(-1)
            weight = (-(top.exp() * top).sum(-1) / math.log(TOP)).clamp(0, 1)
        else:  # talr
            means = (held * wanted).sum(-1) / wanted.sum(-1)
            weight = (-held / means.median(1).values[:, None, None]).exp().clamp_min(0.01)
        return mean_where(nll * weight, wanted)

    def _anchored(self, weights: Weights, anchor: AnchorBatch) -> torch.Tensor:
        hidden = hidden_states(weights, anchor.ids)
        if self.setting.anchor_on == "hidden":
            now = torch.stack([h[:, :, :-1] for h in hidden], 1)
            return mean_where((now - anchor.reference).square().mean(-1).mean(1), anchor.counts)
        return mean_where(kl(anchor.reference, token_losses(weights, hidden[-1], anchor.ids)[1]), anchor.counts)

    # -- LfU -----------------------------------------------------------------------------------------------------------

    def _zero_vectors(self, weights: Weights) -> Tensors:
        embedding = weights[EMBEDDING]
        count = sum(name.endswith("input_layernorm.weight") for name in weights)
        return [embedding.new_zeros(len(embedding), embedding.shape[-1]).requires_grad_() for _ in range(count)]

    def _consistency(
        self, batch: Batch, targets: Tensors, gradient: Tensors, by_leaf: Tensors, by_vector: Tensors
    ) -> Tensors:
        """The gradient of Eq. 5 with respect to theta, by a second pass through the moved model."""
        steering, place = None, None
        weights, leaves = self.theta.weights()
        if self.setting.auxiliary == "own":
            place = self._ascended(self.theta.tensors, gradient)
            weights, leaves = self.theta.weights(place)
        elif self.setting.auxiliary == "lora":
            weights, leaves = self.theta.assembled(self._low_rank_ascent(leaves, by_leaf))
        else:
            steering = self._ascended([torch.zeros_like(v) for v in by_vector], by_vector)
        moved = hidden_states(weights, batch.ids, steering)
        layers = self.setting.layers or range(1, len(moved) + 1)
        where = self._compared(batch)
        apart = [
            ((moved[n - 1][:, :, :-1] - targets[n - 1][:, :, :-1]).square().mean(-1) * where).flatten(1).sum(1)
            for n in layers
        ]
        value = torch.stack(apart).mean(0) / where.flatten(1).sum(1)
        found = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        filled = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]
        return self.theta.chain(filled, place)

    def _compared(self, batch: Batch) -> torch.Tensor:
        """Positions `(S, B, T - 1)` whose hidden states are compared."""
        answer = batch.answer[:, :, 1:]
        text = batch.ids[:, :, 1:] != 0
        return {"answer": answer, "prompt": text & ~answer, "all": text}[self.setting.positions]

    def _ascended(self, tensors: Tensors, gradient: Tensors) -> Tensors:
        """Eq. 2: a step of length alpha along the gradient, one norm over all of it."""
        length = norm(gradient)
        return plus(tensors, gradient, ratio(torch.full_like(length, self.setting.alpha), length))

    @torch.no_grad()
    def _low_rank_ascent(self, leaves: Tensors, by_leaf: Tensors) -> Tensors:
        """The weights after the ascent of a fresh LoRA (A random, B = 0): `dl/dB` is `2 dl/dW A^T`."""
        linear = [is_linear(name) for name in self.theta.names]
        factors = [random_factor(leaf) if ok else None for leaf, ok in zip(leaves, linear)]
        steps = [SCALING * torch.bmm(g, A.transpose(1, 2)) for g, A in zip(by_leaf, factors) if A is not None]
        length = norm(steps)
        length = SCALING * ratio(torch.full_like(length, self.setting.alpha), length)
        step = iter(steps)
        return [
            leaf if A is None else leaf + per_run(length, leaf) * torch.bmm(next(step), A)
            for leaf, A in zip(leaves, factors)
        ]

    def _held(self, sft: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        """lam of this update, from the ratios of the updates before it; takes in this one's."""
        mean_log, seen = self.state
        held = self.setting.strength * torch.exp(-mean_log / seen.clamp_min(1e-12))
        lam = torch.where(
            seen > 0, held, torch.full_like(seen, START * self.setting.strength / abs(self.setting.alpha))
        )
        unit = ratio(extra, sft)
        sound = (unit > 0) & unit.isfinite()
        rate = torch.where(sound, torch.full_like(unit, RATE), torch.zeros_like(unit))
        mean_log.mul_(1 - rate).add_(rate * torch.where(sound, unit, torch.ones_like(unit)).log())
        seen.mul_(1 - rate).add_(rate)
        return lam


def fixed_weights(theta: Theta) -> Weights:
    """The model's weights at theta, without a graph."""
    with torch.no_grad():
        weights, _ = theta.weights()
    return {name: w.detach() for name, w in weights.items()}
