"""The LoRA auxiliary: a low-rank pair beside every linear layer, A random, B zero, fresh for each ascent."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lfu.anatomy import Anatomy, linear_shape, weight_of
from lfu.rng import Generators
from lfu.undesirable.auxiliary import Auxiliary, component_dtype, forward_hooks


class LoRA(Auxiliary):
    """`y + scaling * B A x` on linear layers, with B = 0 at the start of each ascent.

    Args:
        rank: r; A is `(r, in)`, B is `(out, r)`.
        scaling: LoRA's alpha / r; 2 is the paper's fine-tuning adapter (16 / 8).
        targets: endings of module names (`q_proj`) to attach to; None for every linear layer of every block.

    While B is zero the gradient with respect to A is zero, so the first ascent moves B alone; further ones
    (`ascent_steps` > 1) move both.
    """

    def __init__(self, rank: int = 8, scaling: float = 2.0, targets: Sequence[str] | None = None):
        if rank < 1:
            raise ValueError(f"rank={rank}: must be at least 1")
        self.rank, self.scaling, self.targets = rank, scaling, targets
        self.sites: list[nn.Module] = []
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.moved = False

    def bind(self, anatomy: Anatomy) -> None:
        linears = list(anatomy.linears())
        if not linears:
            raise ValueError(
                f"no linear layer found in the blocks of {type(anatomy.model).__name__}: "
                "use auxiliary='steering', which needs none"
            )
        if self.targets is not None:
            have = sorted({name.rsplit(".", 1)[-1] for name, _ in linears})
            endings = tuple(f".{target}" for target in self.targets)
            linears = [(name, module) for name, module in linears if f".{name}".endswith(endings)]
            if not linears:
                raise ValueError(
                    f"no linear layer is called {', '.join(self.targets)}: this model has {', '.join(have)}"
                )
        self.sites = [module for _, module in linears]
        if self.targets is None:
            self._tell_of_uncovered(anatomy)

    def _tell_of_uncovered(self, anatomy: Anatomy) -> None:
        covered = {id(p) for site in self.sites for p in site.parameters()}
        others = [p for block in anatomy.blocks for p in block.parameters() if p.dim() > 1 and id(p) not in covered]
        if others:
            warnings.warn(
                f"{len(others)} weight tensors in the blocks of {type(anatomy.model).__name__} "
                f"({sum(p.numel() for p in others):,} numbers; fused experts, most likely) are not linear layers and "
                "get no LoRA auxiliary; auxiliary='steering' and 'own' reach the whole model",
                stacklevel=2,
            )

    def reset(self, generators: Generators) -> None:
        self.pairs, self.moved = [], False
        for site in self.sites:
            (n_in, n_out), weight = linear_shape(site), weight_of(site)
            dtype = component_dtype(weight.dtype)
            # kaiming-uniform with a = sqrt(5), as PEFT draws its A: uniform in +-1/sqrt(in)
            a = torch.empty(self.rank, n_in, dtype=dtype, device=weight.device)
            a.uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generators(weight.device))
            b = torch.zeros(n_out, self.rank, dtype=dtype, device=weight.device, requires_grad=True)
            self.pairs.append((a, b))

    def parameters(self) -> list[torch.Tensor]:
        return [t for pair in self.pairs for t in (pair if self.moved else pair[1:])]

    def move(self, steps: Iterable[torch.Tensor | None]) -> None:
        super().move(steps)
        self.moved = True
        for a, _ in self.pairs:
            a.requires_grad_()

    def attached(self) -> AbstractContextManager[None]:
        return forward_hooks([(site, self._hook(*pair)) for site, pair in zip(self.sites, self.pairs, strict=True)])

    def discard(self) -> None:
        self.pairs = []

    def _hook(self, a: torch.Tensor, b: torch.Tensor):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> Any:
            if not self.moved:
                return _ZeroB.apply(y, args[0], a, b, self.scaling)
            x = args[0]
            low = F.linear(x, a.to(x.dtype) * self.scaling)  # (..., r): scaled where it is smallest
            return y + F.linear(low, b.to(low.dtype)).to(y.dtype)

        return hook


class _ZeroB(torch.autograd.Function):
    """`y + scaling * B A x` for B = 0: costs no forward arithmetic, changes no bit, and still has its gradient.

    dl/dB = scaling * (dl/dy)^T (x A^T), summed over tokens.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float):
        ctx.save_for_backward(x, a)
        ctx.scaling, ctx.dtype = scaling, b.dtype
        if y._is_view():  # GPT-2's Conv1D; a view of ours could not be changed in place by the model (OLMo's clamp_)
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        (grad_y,) = gradients
        x, a = ctx.saved_tensors
        low = F.linear(x.to(grad_y.dtype), a.to(grad_y.dtype)).flatten(0, -2)  # (tokens, r)
        grad_b = grad_y.flatten(0, -2).T @ low  # (out, r)
        return grad_y, None, None, ctx.scaling * grad_b.to(ctx.dtype), None
