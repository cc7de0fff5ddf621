"""A low-rank pair beside each expert of a fused tensor, such as Mixtral's `gate_up_proj` `(experts, out, in)`.

Fused experts are a parameter, not a linear layer, and a model multiplies by them in its own way: one expert at a time,
gathered, or grouped. So within the experts' forward the parameter has a stand-in that knows `W + L R` and multiplies by
W, by L and by R. The sum is not formed: in bfloat16 it would round L R away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from lfu.model.anatomy import FusedExperts

_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_ALIGNED = 8  # grouped products on a GPU want rows of a multiple of 16 bytes


class PlusLowRank(torch.Tensor):
    """W `(..., m, n)` that stands for `W + left @ right`; left `(..., m, r)`, right `(..., r, n)`.

    Products with it, one expert of it and its transpose are computed from the three parts. Anything else that gives a
    tensor is given the sum; shape, dtype and the like are W's.
    """

    left: torch.Tensor
    right: torch.Tensor

    @staticmethod
    def of(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> PlusLowRank:
        made = weight.as_subclass(PlusLowRank)  # the same numbers and the same graph
        made.left, made.right = left, right
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # within it such a tensor is W alone
            return _apply(func, args, kwargs)


def _apply(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "") if len(args) > 1 else ""
    if name == "linear" and isinstance(args[1], PlusLowRank):
        x, w = args[0], args[1]
        return func(*args, **kwargs) + F.linear(F.linear(x, w.right), w.left)
    if name in _PRODUCTS and isinstance(args[1], PlusLowRank):
        x, w, *rest = args
        return func(*args, **kwargs) + func(func(x, w.left, *rest, **kwargs), w.right, *rest, **kwargs)
    if name in ("matmul", "__matmul__", "mm", "bmm") and not isinstance(args[1], PlusLowRank):
        w, x = args
        return func(w, x) + func(w.left, func(w.right, x))
    if name == "__getitem__" and not isinstance(args[1], (tuple, slice)):
        w, index = args
        return PlusLowRank.of(w[index], w.left[index], w.right[index])
    if name == "transpose" and not kwargs and {d % args[0].dim() - args[0].dim() for d in args[1:]} == {-2, -1}:
        w = args[0]
        return PlusLowRank.of(w.transpose(-2, -1), w.right.transpose(-2, -1), w.left.transpose(-2, -1))
    result = func(*args, **kwargs)
    parts = result if isinstance(result, (tuple, list)) else (result,)
    if not any(isinstance(part, torch.Tensor) for part in parts):
        return result
    whole = lambda t: t.as_subclass(torch.Tensor) + t.left @ t.right if isinstance(t, PlusLowRank) else t
    args, kwargs = tree_map(whole, (args, kwargs))
    return func(*args, **kwargs)


class _Appended(nn.Module):
    """The stand-in behind the parametrization of another library (PEFT's adapter on a parameter)."""

    def __init__(self, stand_in: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.stand_in = stand_in

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.stand_in(weight)


def with_low_rank(
    experts: FusedExperts, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> AbstractContextManager[None]:
    """Within it the experts run as `W_e + scaling * B_e A_e`, a `(experts, r, in)` and b `(experts, out, r)`.

    B = 0 changes no number.
    """

    def stand_in(weight: torch.Tensor) -> torch.Tensor:
        pad = -a.shape[1] % _ALIGNED
        left = F.pad(b, (0, pad)).to(weight.dtype)
        right = F.pad(a * scaling, (0, 0, 0, pad)).to(weight.dtype)
        if experts.transposed:
            left, right = right.transpose(-2, -1), left.transpose(-2, -1)
        return PlusLowRank.of(weight, left, right)

    return _lent(experts.module, experts.name, stand_in)


@contextmanager
def _lent(module: nn.Module, name: str, stand_in: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within each forward of `module` its parameter `name` reads as the stand-in; nothing in the tree is renamed."""

    def lend(module: nn.Module, args: Any) -> None:
        if parametrize.is_parametrized(module, name):
            chain: Any = module.parametrizations[name]  # type: ignore[index]
            chain.append(_Appended(stand_in))
        else:
            module.__dict__[name] = stand_in(module.get_parameter(name))  # found before the parameter

    def give_back(module: nn.Module, *_: Any) -> None:
        module.__dict__.pop(name, None)
        if parametrize.is_parametrized(module, name):
            chain: Any = module.parametrizations[name]  # type: ignore[index]
            if isinstance(chain[-1], _Appended):
                del chain[-1]

    try:
        # always: also where a recompute is cut short
        with module.register_forward_pre_hook(lend), module.register_forward_hook(give_back, always_call=True):
            yield
    finally:
        give_back(module)
