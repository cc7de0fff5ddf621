"""The `own` auxiliary: theta itself is moved by the ascent and put back (what the authors' code does for LoRA)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import nn

from lfu.model.anatomy import Anatomy
from lfu.model.rng import Generators
from lfu.model.tensors import global_norm
from lfu.undesirable.auxiliary import Auxiliary, add


class Own(Auxiliary):
    """No components beside theta: its trainable parameters take the step, and the copies put them back.

    The consistency gradient is taken AT the moved weights: backward ends before `discard`. (The authors' code puts the
    weights back before backward runs, so its gradient mixes both: a defect that is not copied here.)
    """

    name: ClassVar[str] = "own"

    def __init__(self) -> None:
        self.anatomy: Anatomy | None = None
        self.theta: list[nn.Parameter] = []
        self.copies: list[torch.Tensor] = []

    def bind(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy

    def reset(self, generators: Generators) -> None:
        assert self.anatomy is not None
        self.discard()
        self.theta = self.anatomy.theta()

    def parameters(self) -> list[nn.Parameter]:
        return self.theta

    def take_gradients(self) -> list[torch.Tensor | None]:
        return [p.grad for p in self.theta]  # left in place: they are the SFT part of Eq. 6

    def move(self, steps: Iterable[torch.Tensor | None], length: float = 1.0) -> None:
        if not self.copies:
            self.copies = [p.detach().clone() for p in self.theta]
        pairs = [(p, step) for p, step in zip(self.theta, steps, strict=True) if step is not None]
        add([(p, step) for p, step in pairs if p.dtype.itemsize >= 4], length)
        self.rounded = _add_narrow([(p, step) for p, step in pairs if p.dtype.itemsize < 4], length)
        torch.clear_autocast_cache()  # within a caller's autocast it would keep the weights as they were, cast

    def attached(self) -> AbstractContextManager[None]:
        return nullcontext()

    def freeze(self) -> None:
        """Nothing to do: theta goes on requiring its gradient."""

    def kept(self) -> list[torch.Tensor]:
        """The step away from theta, not the place: theta has moved on when it is used again."""
        return [p.detach() - copy for p, copy in zip(self.theta, self.copies, strict=True)]

    def restore(self, kept: Sequence[torch.Tensor]) -> None:
        assert self.anatomy is not None
        self.discard()
        self.theta = self.anatomy.theta()
        self.move(step.to(p.device) for p, step in zip(self.theta, kept, strict=True))

    def discard(self) -> None:
        with torch.no_grad():
            for p, copy in zip(self.theta, self.copies):
                p.copy_(copy)
        if self.copies:
            torch.clear_autocast_cache()
        self.copies = []


def _add_narrow(pairs: list[tuple[nn.Parameter, torch.Tensor]], length: float) -> float:
    """`p += length * step` on 16-bit weights, one in memory at a time; the share of the step that rounding took."""
    wanted: list[torch.Tensor] = []  # norms, a tensor each
    lost: list[torch.Tensor] = []
    with torch.no_grad():
        for p, gradient in pairs:
            before, step = p.detach().float(), gradient * length
            p.add_(step.to(p.dtype))
            wanted.append(torch.linalg.vector_norm(step.float()))
            lost.append(torch.linalg.vector_norm(p.float() - before - step.float()))
    return global_norm(lost) / global_norm(wanted) if wanted else 0.0
