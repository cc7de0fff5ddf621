"""The `own` auxiliary: theta itself is moved by the ascent and put back (what the authors' code does for LoRA)."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import nn

from lfu.model.anatomy import Anatomy
from lfu.model.precision import round_at_random
from lfu.model.rng import Generators
from lfu.undesirable.auxiliary import Auxiliary, add


class Own(Auxiliary):
    """No components beside theta: its trainable parameters take the step, and the copies put them back.

    The consistency gradient is taken AT the moved weights: backward ends before `discard`. (The authors' code puts the
    weights back before backward runs, so its gradient mixes both: a defect that is not copied here.)

    A step is spread over all of theta, far below what 16-bit weights resolve. So they are rounded at random: to the
    nearest, most of the step would be lost (docs/method.md has figures).
    """

    name: ClassVar[str] = "own"
    of_theta = True

    def __init__(self) -> None:
        self.anatomy: Anatomy | None = None
        self.theta: list[nn.Parameter] = []
        self.copies: list[torch.Tensor] = []
        self.generators: Generators | None = None  # of the rounding; None: to the nearest

    def bind(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy

    def reset(self, generators: Generators | None) -> None:
        assert self.anatomy is not None
        self.discard()
        self.theta, self.generators = self.anatomy.theta(), generators

    def parameters(self) -> list[nn.Parameter]:
        return self.theta

    def take_gradients(self) -> list[torch.Tensor | None]:
        return [p.grad for p in self.theta]  # left in place: they are the SFT part of Eq. 6

    def move(self, steps: Iterable[torch.Tensor | None], length: float = 1.0) -> None:
        if not self.copies:
            self.copies = [p.detach().clone() for p in self.theta]
        pairs = [(p, step) for p, step in zip(self.theta, steps, strict=True) if step is not None]
        nearest = lambda p: p.dtype.itemsize >= 4 or self.generators is None
        add([(p, step) for p, step in pairs if nearest(p)], length)
        with torch.no_grad():
            for p, step in pairs:  # one in memory at a time
                if not nearest(p):
                    assert self.generators is not None
                    moved = p.float().add_(step, alpha=length)
                    p.copy_(round_at_random(moved, p.dtype, self.generators(p.device)))
        torch.clear_autocast_cache()  # within a caller's autocast it would keep the weights as they were, cast

    def attached(self) -> AbstractContextManager[None]:
        return nullcontext()

    def freeze(self) -> None:
        """Nothing to do: theta goes on requiring its gradient."""

    def kept(self) -> list[torch.Tensor]:
        """The step away from theta, not the place: theta has moved on when it is used again."""
        return [p.detach() - copy for p, copy in zip(self.theta, self.copies, strict=True)]

    def restore(self, kept: Sequence[torch.Tensor]) -> None:
        self.reset(None)  # what is kept has been rounded
        self.move(step.to(p.device) for p, step in zip(self.theta, kept, strict=True))

    def discard(self) -> None:
        with torch.no_grad():
            for p, copy in zip(self.theta, self.copies):
                p.copy_(copy)
        if self.copies:
            torch.clear_autocast_cache()
        self.copies = []
