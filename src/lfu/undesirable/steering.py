"""The RepS auxiliary: one steering vector d_l per layer, zero at the start, added to the block's output."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn

from lfu.model.anatomy import Anatomy
from lfu.model.representations import hidden_of, with_hidden
from lfu.model.rng import Generators
from lfu.undesirable.auxiliary import Auxiliary, component_dtype, forward_hooks


class Steering(Auxiliary):
    """`h'[l] = h[l] + d_l` at every token, carried forward through the remaining layers (paper, RepS).

    Args:
        preserve_norm: the authors' code instead: d_l is added to `h / ||h||`, and the sum scaled back to `||h||`.
    """

    name: ClassVar[str] = "steering"
    in_blocks = True
    settings = {"steering_norm": "preserve_norm"}  # noqa: RUF012

    def __init__(self, preserve_norm: bool = False):
        self.preserve_norm = preserve_norm
        self.blocks: list[nn.Module] = []
        self.width = 0
        self.vectors: list[torch.Tensor] = []
        self.moved = False

    def bind(self, anatomy: Anatomy) -> None:
        self.blocks = anatomy.blocks
        self.width = anatomy.model.config.get_text_config().hidden_size

    def reset(self, generators: Generators) -> None:
        self.moved = False
        weights = [next(block.parameters()) for block in self.blocks]
        zeros = lambda w: torch.zeros(self.width, dtype=component_dtype(w.dtype), device=w.device, requires_grad=True)
        self.vectors = [zeros(weight) for weight in weights]

    def parameters(self) -> list[torch.Tensor]:
        return self.vectors

    def move(self, steps: Iterable[torch.Tensor | None], length: float = 1.0) -> None:
        super().move(steps, length)
        self.moved = True

    def attached(self) -> AbstractContextManager[None]:
        return forward_hooks([(block, self._hook(d)) for block, d in zip(self.blocks, self.vectors, strict=True)])

    def kept(self) -> list[torch.Tensor]:
        return [d.detach() for d in self.vectors]

    def restore(self, kept: Sequence[torch.Tensor]) -> None:
        devices = [next(block.parameters()).device for block in self.blocks]
        self.vectors = [d.to(device) for d, device in zip(kept, devices, strict=True)]
        self.moved = True

    def discard(self) -> None:
        self.vectors = []

    def _hook(self, d: torch.Tensor):
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            if not self.moved:
                return with_hidden(output, _ZeroSteering.apply(hidden, d, self.preserve_norm))
            if not self.preserve_norm:
                return with_hidden(output, hidden + d.to(hidden.dtype))
            norm = _norm(hidden)
            steered = hidden / norm + d.to(hidden.dtype)
            return with_hidden(output, norm * steered / _norm(steered))

        return hook


def _norm(hidden: torch.Tensor) -> torch.Tensor:
    """`||h||` of each token, `(..., 1)`; a padding token may have h = 0, and 0 / 0 must not spread."""
    return torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).clamp_min(torch.finfo(hidden.dtype).tiny)


class _ZeroSteering(torch.autograd.Function):
    """Steering by d = 0: changes no bit, and has the gradient with respect to d.

    dl/dd = sum over tokens of g = dl/dh, or, preserving the norm, of `||h|| (g - u (u . g))` with `u = h / ||h||`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, d: torch.Tensor, preserve_norm: bool):
        ctx.dtype, ctx.preserve_norm = d.dtype, preserve_norm
        ctx.save_for_backward(*([hidden] if preserve_norm else []))
        return hidden.clone()  # a view could not be changed in place by the next block; what is saved is this one

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        (grad,) = gradients
        per_token = grad.to(ctx.dtype)
        if ctx.preserve_norm:
            (hidden,) = ctx.saved_tensors  # read once: checkpointing and offloading hand it out once
            hidden = hidden.to(ctx.dtype)
            norm = _norm(hidden)
            unit = hidden / norm
            per_token = norm * (per_token - unit * (unit * per_token).sum(-1, keepdim=True))
        return grad, per_token.flatten(0, -2).sum(0), None
