"""The two gradients of theta in several processes, where a reducer must find their sum: measured as they arrive."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lfu.model.precision import wide
from lfu.model.tensors import global_norm_tensor


class Taps:
    """What `SplitGradients` is to one process: the two gradients of theta measured as they arrive, by tensor hooks.

    A reducer must find the sum of all parts in `.grad` (FSDP2 keeps it out of sight), so none is put aside; only for
    the `own` auxiliary that of earlier micro-batches, during the clean pass: its ascent needs this one's alone.

    The figures are those of all processes' gradients before they are averaged, laid end to end: three numbers are
    summed instead of a gradient, and every process sees the same ratio.

    `measured` are those of `theta` to measure; `own`: the ascent moves theta.
    """

    def __init__(self, processes: Any, measured: Sequence[nn.Parameter], theta: Sequence[nn.Parameter], own: bool):
        self.processes, self.theta, self.second = processes, theta, False
        self.keep: int | None = None  # without effect: what a reducer has summed can't be taken apart
        # the first backward's gradient and its square: autograd may add the second's to it where it lies
        self.first: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self.sums: dict[Any, torch.Tensor] = {}  # (cons . cons, sft . cons), float64
        self.handles: list[Any] = []
        self.tapped: set[int] = set()
        self.earlier = [(p, p.grad) for p in theta] if own else []
        for p, _ in self.earlier:
            p.grad = None
        if processes.sharded:  # FSDP2 and ZeRO-3, whose whole parameters exist only while a module runs
            chosen = {id(p) for p in measured}
            for module in processes.unwrapped(processes.wrapper).modules():
                names = [name for name, p in module.named_parameters(recurse=False) if id(p) in chosen]
                if names:
                    self.handles.append(module.register_forward_pre_hook(partial(self._tap_whole, names)))
        else:
            for p in measured:
                self._tap(p)

    def _tap_whole(self, names: list[str], module: nn.Module, args: Any) -> None:
        for name in names:
            self._tap(getattr(module, name))

    def _tap(self, p: torch.Tensor) -> None:
        if id(p) not in self.tapped and p.requires_grad:
            self.tapped.add(id(p))
            self.handles.append(p.register_hook(lambda gradient: self._arrived(id(p), gradient.detach())))

    def _arrived(self, key: int, gradient: torch.Tensor) -> None:
        if not self.second:
            self.first[key] = gradient, _squared(gradient)
            return
        before, _ = self.first.get(key, (None, None))
        squared = _squared(gradient)
        both = None if before is None else wide(before) * wide(gradient)
        dot = torch.zeros_like(squared) if both is None else both.sum(dtype=torch.float64)
        self.sums[key] = torch.stack([squared, dot])

    def set_aside(self) -> None:
        """The clean pass is over: `.grad` is again the sum with earlier micro-batches."""
        for p, before in self.earlier:
            if before is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)
        self.earlier = []

    def undo(self) -> bool:
        """Never: what has come since is in the sum."""
        return False

    def narrow(self, measured: Sequence[nn.Parameter]) -> None:
        """Nothing is kept that could be given up."""

    def abandon(self) -> None:
        """After an error: nothing of this update is left, as its parts can't be told apart."""
        self.join()
        for p in self.theta:
            p.grad = None

    def compare(self) -> tuple[float, float, float]:
        """`(||g_sft||, ||g_cons||, cosine)`, as `SplitGradients.compare`; the same in every process."""
        sft = float(torch.stack([squared for _, squared in self.first.values()]).sum()) if self.first else 0.0
        found = torch.stack(list(self.sums.values())).sum(0).tolist() if self.sums else [0.0, 0.0]
        a, b, dot = self.processes.summed([sft, *found])
        scale = math.sqrt(a) * math.sqrt(b) if a >= 0 and b >= 0 else math.nan  # NaN is not >= 0
        cosine = dot / scale if scale > 0 and math.isfinite(dot / scale) else 0.0
        return math.sqrt(a) if a >= 0 else math.nan, math.sqrt(b) if b >= 0 else math.nan, cosine

    def unsure(self) -> Sequence[nn.Parameter]:
        """All: what the reducer has made of the gradients is in `.grad`."""
        return self.theta

    def join(self) -> None:
        """Hooks off."""
        self.set_aside()
        for handle in self.handles:
            handle.remove()
        self.handles, self.first, self.sums = [], {}, {}


def _squared(gradient: torch.Tensor) -> torch.Tensor:
    return global_norm_tensor([gradient]).square()
