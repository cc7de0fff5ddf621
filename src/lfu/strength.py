"""How strong the consistency term really is: its gradient beside SFT's, and `lam="auto"`, which holds the two apart.

The gradient of lam * ||h' - h||^2 is first order in alpha, its value second order: the value says nothing about the
strength, the gradient does. In the 2F+2B order the two gradients come from two backwards, so both are there to see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lfu.undesirable.ascent import global_norm

# Above this many elements of theta, whole tensors are sampled: 2^24 float32 gradients are 64 MB.
SAMPLE = 2**24


def sample_of(theta: Sequence[nn.Parameter], limit: int = SAMPLE) -> list[nn.Parameter]:
    """The tensors of theta whose two gradients are kept apart: all, or whole tensors drawn up to `limit` elements.

    The draw has a fixed seed: the same tensors in each step and each run of a model. At least one tensor is taken.
    """
    if sum(p.numel() for p in theta) <= limit:
        return list(theta)
    order = torch.randperm(len(theta), generator=torch.Generator().manual_seed(0)).tolist()
    chosen, room = [], limit
    for p in (theta[i] for i in order):
        if p.numel() <= room:
            chosen.append(p)
            room -= p.numel()
    return chosen or [min(theta, key=lambda p: p.numel())]


class SplitGradients:
    """Keeps what earlier micro-batches, the SFT backward and the consistency backward left on theta apart.

    By moving `.grad` tensors aside, not by copying them: a backward that finds None writes a fresh tensor. `join`
    adds the parts up again; until then a plain `optimizer.step()` would miss some.

    Args:
        theta: all trainable parameters.
        measured: those among them that are kept apart.
    """

    def __init__(self, theta: Sequence[nn.Parameter], measured: Sequence[nn.Parameter]):
        self.theta, self.measured = theta, measured
        self.parts: list[list[torch.Tensor | None]] = []
        self.set_aside()

    def set_aside(self) -> None:
        """What is on the measured tensors now becomes a part of its own."""
        self.parts.append([p.grad for p in self.measured])
        for p in self.measured:
            p.grad = None

    def norms(self) -> tuple[float, float, float]:
        """`(||g_sft||, ||g_cons||, cosine)`: the second part, and what came since. The cosine is 0 where undefined."""
        sft, cons = self.parts[1], [p.grad for p in self.measured]
        a, b = global_norm(sft), global_norm(cons)
        dot = math.fsum(
            torch.sum(x * y, dtype=torch.float64).item() for x, y in zip(sft, cons) if x is not None and y is not None
        )
        return a, b, dot / (a * b) if a * b > 0 else 0.0

    def join(self) -> None:
        """Put the sum of the parts and of what is there now on `.grad`."""
        self.set_aside()
        for i, p in enumerate(self.measured):
            for part in self.parts:
                gradient = part[i]
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self.parts = []


@dataclass
class Strength:
    """`lam="auto"`: lam such that ||grad(lam * consistency)|| / ||grad(SFT)|| stays near `target`.

    The ratio is linear in lam, so lam = target / r with r the ratio at lam = 1: a running geometric mean over
    micro-batches (it spans orders of magnitude), bias-corrected so that the first one counts in full.

    Args:
        target: the wanted ratio.
        start: lam of the very first micro-batch, small enough not to act: it only measures.
        decay: of the running mean; 0.9 remembers some ten micro-batches.
    """

    target: float
    start: float
    decay: float = 0.9
    mean_log: float = 0.0
    weight: float = 0.0

    @property
    def lam(self) -> float:
        return self.target * math.exp(-self.mean_log / self.weight) if self.weight else self.start

    def update(self, unit_ratio: float) -> None:
        """Take in the gradient ratio at lam = 1; zero and non-finite values teach nothing."""
        if not (math.isfinite(unit_ratio) and unit_ratio > 0):
            return
        self.mean_log = self.decay * self.mean_log + (1 - self.decay) * math.log(unit_ratio)
        self.weight = self.decay * self.weight + (1 - self.decay)
