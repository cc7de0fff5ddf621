"""What is trained: all weights, or a LoRA on every linear layer; and small arithmetic on lists of tensors of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from testbed.llama import Weights, is_linear

RANK, SCALING = 8, 2.0
Tensors = list[torch.Tensor]


class AllWeights:
    """theta is every weight of the model, `(S, ...)` each."""

    def __init__(self, start: Weights):
        self.names = list(start)
        self.tensors: Tensors = [w.clone() for w in start.values()]

    def weights(self, tensors: Tensors | None = None) -> tuple[Weights, Tensors]:
        """The model's weights at theta (or at `tensors`), and those of them that theta reaches, as leaves."""
        return self.assembled(tensors or self.tensors)

    def assembled(self, leaves: Sequence[torch.Tensor]) -> tuple[Weights, Tensors]:
        """The model's weights with these in place of those that theta reaches."""
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        return dict(zip(self.names, leaves)), leaves

    def chain(self, gradients: Sequence[torch.Tensor], tensors: Tensors | None = None) -> Tensors:
        """From gradients with respect to the leaves to those with respect to theta."""
        return list(gradients)


class LoRAWeights:
    """theta is A `(S, r, in)` and B `(S, out, r)` of every linear layer: the weight is `W0 + 2 B A`. B starts at 0."""

    def __init__(self, start: Weights):
        self.start = start
        self.names = [name for name in start if is_linear(name)]
        self.tensors = []
        for name in self.names:
            self.tensors += [random_factor(start[name]), start[name].new_zeros(*start[name].shape[:2], RANK)]

    def weights(self, tensors: Tensors | None = None) -> tuple[Weights, Tensors]:
        tensors = tensors or self.tensors
        products = [torch.bmm(B, A) for A, B in zip(tensors[::2], tensors[1::2])]
        return self.assembled([self.start[name] + SCALING * p for name, p in zip(self.names, products)])

    def assembled(self, leaves: Sequence[torch.Tensor]) -> tuple[Weights, Tensors]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        return self.start | dict(zip(self.names, leaves)), leaves

    def chain(self, gradients: Sequence[torch.Tensor], tensors: Tensors | None = None) -> Tensors:
        tensors = tensors or self.tensors
        found: Tensors = []
        for i, g in enumerate(gradients):
            A, B = tensors[2 * i], tensors[2 * i + 1]
            found += [SCALING * torch.bmm(B.transpose(1, 2), g), SCALING * torch.bmm(g, A.transpose(1, 2))]
        return found


Theta = AllWeights | LoRAWeights


def random_factor(weight: torch.Tensor) -> torch.Tensor:
    """A LoRA's A for a weight `(S, out, in)`: uniform in +-1/sqrt(in), `(S, r, in)`, of the default generator."""
    runs, _, inner = weight.shape
    drawn = torch.rand(runs, RANK, inner, device=weight.device, dtype=weight.dtype)
    return (2 * drawn - 1) / math.sqrt(inner)


def norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of each run over all tensors, `(S,)`."""
    return torch.stack([torch.linalg.vector_norm(t.flatten(1), dim=1) for t in tensors]).norm(dim=0)


def per_run(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(S,)` values shaped to multiply `(S, ...)`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def plus(tensors: Sequence[torch.Tensor], more: Sequence[torch.Tensor], factor: torch.Tensor) -> Tensors:
    """`tensors + factor * more`, with a factor a run."""
    return [t + per_run(factor, m) * m for t, m in zip(tensors, more)]


def ratio(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`one / other`, and 0 where `other` is 0."""
    return torch.where(other > 0, one / other.clamp_min(torch.finfo(other.dtype).tiny), torch.zeros_like(one))
