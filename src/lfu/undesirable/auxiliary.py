"""What an auxiliary is. A new kind is one file here with a subclass that has a `name`; it is found by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from lfu.model.anatomy import Anatomy
from lfu.model.representations import forward_hooks as forward_hooks
from lfu.model.rng import Generators

# name -> class, of every kind that is defined
KINDS: dict[str, type[Auxiliary]] = {}


class Auxiliary(ABC):
    """Components beside theta that start as an exact no-op, are moved by one ascent (Eq. 2), and are thrown away.

    The life of one micro-batch: `reset`, then with `attached` a forward and backward (the no-op: no output bit
    changes), `take_gradients`, a move by `ascend`, with `attached` the perturbed forward and backward, `discard`.

    They live outside the module tree, attached by forward hooks: never in a state dict, an optimizer or a reducer.

    A subclass with a `name` is one of `KINDS`: what `auxiliary=` and `--auxiliary` may be. Its `settings` are the
    fields of `LfUConfig` that it uses, and its arguments for them; it `ignores` settings of the step that play no part
    with it.
    """

    name: ClassVar[str]
    settings: ClassVar[Mapping[str, str]] = {}
    ignores: ClassVar[Sequence[str]] = ()
    of_theta: ClassVar[bool] = False  # what the ascent moves is theta itself
    in_blocks: ClassVar[bool] = False  # the components lie in the blocks: the head stays as it is

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            KINDS[cls.name] = cls

    @abstractmethod
    def bind(self, anatomy: Anatomy) -> None:
        """Look at the model. Raises ValueError where there is nothing to attach to."""

    @abstractmethod
    def reset(self, generators: Generators) -> None:
        """Fresh components, an exact no-op; any drawing from `generators` alone."""

    @abstractmethod
    def parameters(self) -> Sequence[torch.Tensor]:
        """The leaf tensors that the next ascent step moves; a tensor whose gradient must be zero may be left out."""

    @abstractmethod
    def attached(self) -> AbstractContextManager[None]:
        """Within it the model runs as theta_aux. Backward belongs inside too (gradient checkpointing recomputes)."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the move: theta is again bit for bit what it was."""

    def take_gradients(self) -> list[torch.Tensor | None]:
        """The gradients a shared backward left on `parameters()`, taken off them."""
        gradients = [p.grad for p in self.parameters()]
        for p in self.parameters():
            p.grad = None
        return gradients

    def move(self, steps: Iterable[torch.Tensor | None], length: float = 1.0) -> None:
        """Add `length` times a step to each parameter, in the parameters' order; None is no step."""
        add([(p, step) for p, step in zip(self.parameters(), steps, strict=True) if step is not None], length)

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run must know to do the same arithmetic in the same order; nothing of the components."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:  # noqa: B027 (most have none to take up)
        """Take up the `state` of the run before."""

    def kept(self) -> list[torch.Tensor]:
        """The moved components, detached: what `restore` needs to bring the undesirable model back (`stale`)."""
        raise NotImplementedError

    def restore(self, kept: Sequence[torch.Tensor]) -> None:
        """In place of `reset` and a move: the components as they were when `kept`, as constants."""
        raise NotImplementedError

    @property
    def can_be_kept(self) -> bool:
        """Whether a later micro-batch may use the moved components again."""
        return type(self).kept is not Auxiliary.kept and type(self).restore is not Auxiliary.restore

    def freeze(self) -> None:
        """From here on the components are constants (Eq. 5 has no second-order terms)."""
        for p in self.parameters():
            p.requires_grad_(False)


def add(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], length: float) -> None:
    """`p += length * step` for each `(p, step)`, without a copy of the step where the dtypes are one."""
    if pairs:
        with torch.no_grad():
            torch._foreach_add_([p for p, _ in pairs], [step.to(p.dtype) for p, step in pairs], alpha=length)


def component_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a component: float32 unless the weights are wider, so that a small move is not rounded away."""
    return torch.float64 if dtype == torch.float64 else torch.float32
