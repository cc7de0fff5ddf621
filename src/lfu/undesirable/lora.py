"""The LoRA auxiliary: a low-rank pair beside every linear layer and expert, A random, B zero, fresh for each ascent."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lfu.model.anatomy import Anatomy, FusedExperts, is_idle, linear_shape, weight_of, whole_shape
from lfu.model.rng import Generators
from lfu.model.tensors import cast, views
from lfu.undesirable.auxiliary import Auxiliary, component_dtype, forward_hooks
from lfu.undesirable.experts import with_low_rank

_WORTH_TELLING = 0.05  # of a block's weights: less is routers and short convolutions


class LoRA(Auxiliary):
    """`y + scaling * B A x` on linear layers, with B = 0 at the start of each ascent.

    A fused expert tensor (see `experts.py`) gets a pair for each expert. Routers and convolutions get none.

    Args:
        rank: r; A is `(r, in)`, B is `(out, r)`.
        scaling: LoRA's alpha / r; 2 is the paper's fine-tuning adapter (16 / 8).
        targets: endings of names (`q_proj`, `experts.gate_up_proj`) to attach to, in a list or with commas between;
            None for every linear layer and fused expert tensor of every block.

    Raises:
        ValueError: a rank below 1, a scaling that is not a finite number > 0.

    While B is zero the gradient with respect to A is zero, so the first ascent moves B alone; further ones
    (`ascent_steps` > 1) move both.
    """

    name: ClassVar[str] = "lora"
    in_blocks = True

    settings = {"aux_rank": "rank", "aux_scaling": "scaling", "aux_targets": "targets"}  # noqa: RUF012

    def __init__(self, rank: int = 8, scaling: float = 2.0, targets: Sequence[str] | str | None = None):
        if rank < 1:
            raise ValueError(f"aux_rank must be at least 1, got {rank!r}")
        if not (math.isfinite(scaling) and scaling > 0):
            raise ValueError(f"aux_scaling must be a finite number > 0, got {scaling!r}")
        names = targets.split(",") if isinstance(targets, str) else targets or ()
        self.rank, self.scaling = rank, scaling
        self.targets = [name.strip() for name in names if name.strip()] if targets else None
        self.sites: list[nn.Module] = []
        self.names: list[str] = []
        self.uses: list[tuple[nn.Module, int]] = []  # every layer to hook, with the number of its site
        self.experts: list[FusedExperts] = []  # their pairs follow those of the sites
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.constants: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}  # see _in
        self.groups: dict[int, list[int]] = {}  # see _SharedInputs
        self.moved = self.told = False

    def bind(self, anatomy: Anatomy) -> None:
        linears, experts = dict(anatomy.linears()), dict(anatomy.experts())
        have = sorted({name.rsplit(".", 1)[-1] for name in (*linears, *experts)})
        if not have:
            raise ValueError(
                f"no linear layer found in the blocks of {type(anatomy.model).__name__}: "
                "use auxiliary='steering', which needs none"
            )
        if self.targets is not None:
            endings = tuple(f".{target}" for target in self.targets)
            linears = {name: site for name, site in linears.items() if f".{name}".endswith(endings)}
            experts = {name: site for name, site in experts.items() if f".{name}".endswith(endings)}
            if not linears and not experts:
                wanted = ", ".join(self.targets)
                raise ValueError(f"no linear layer is called {wanted}: this model has {', '.join(have)}")
        self.names, self.sites, self.uses, self.groups, self.experts = [], [], [], {}, list(experts.values())
        number: dict[int, int] = {}  # of each weight; one that several layers share (Zamba2's attention) has one pair
        for name, site in linears.items():
            self.uses.append((site, number.setdefault(id(weight_of(site)), len(number))))
            if len(number) > len(self.sites):
                self.names.append(name)
                self.sites.append(site)
        if self.targets is None:
            self._tell_of_uncovered(anatomy)

    def _tell_of_uncovered(self, anatomy: Anatomy) -> None:
        covered = {id(p) for site in self.sites for p in site.parameters()}
        covered |= {id(site.weight) for site in self.experts}
        weights = {
            p: name.replace("base_layer.", "")
            for block in anatomy.blocks
            for name, p in block.named_parameters()
            if len(whole_shape(p)) > 1 and ".lora_" not in name and not name.endswith("bias") and not is_idle(name)
        }
        others = {p: name for p, name in weights.items() if id(p) not in covered}
        size = sum(whole_shape(p).numel() for p in others)
        if size > _WORTH_TELLING * sum(whole_shape(p).numel() for p in weights):
            warnings.warn(
                f"{len(others)} weight tensors in the blocks of {type(anatomy.model).__name__} ({size:,} numbers: "
                f"{', '.join(sorted(set(others.values()))[:4])}) are neither linear layers nor fused experts of a "
                "known layout, and get no LoRA auxiliary; auxiliary='steering' and 'own' reach the whole model",
                stacklevel=2,
            )

    def reset(self, generators: Generators) -> None:
        """A `(r, in)` random and B `(out, r)` zero, those of experts `(experts, ...)`; one draw a device and dtype."""
        self.moved = False
        shapes: list[tuple[tuple[int, ...], int, int]] = [((), *linear_shape(site)) for site in self.sites]
        shapes += [((count,), n_in, n_out) for count, n_in, n_out in (fused.shape for fused in self.experts)]
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for n, weight in enumerate((*map(weight_of, self.sites), *(fused.weight for fused in self.experts))):
            alike.setdefault((weight.device, component_dtype(weight.dtype)), []).append(n)
        pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for (device, dtype), members in alike.items():
            a_shapes = [(*lead, self.rank, n_in) for lead, n_in, _ in (shapes[n] for n in members)]
            b_shapes = [(*lead, self.rank, n_out) for lead, _, n_out in (shapes[n] for n in members)]
            flat = torch.empty(sum(map(math.prod, a_shapes)), dtype=dtype, device=device)
            a = views(flat.uniform_(-1, 1, generator=generators(device)), a_shapes)
            # kaiming-uniform with a = sqrt(5), as PEFT draws its A: uniform in +-1/sqrt(in)
            torch._foreach_mul_(a, [1 / math.sqrt(shape[-1]) for shape in a_shapes])
            b = views(torch.zeros(sum(map(math.prod, b_shapes)), dtype=dtype, device=device), b_shapes)
            # B lies in memory as its transpose, as its gradient does: then autograd keeps that without a copy
            pairs |= {n: (a_, b_.transpose(-2, -1).requires_grad_()) for n, a_, b_ in zip(members, a, b)}
        self.pairs, self.constants = [pairs[n] for n in range(len(shapes))], {}

    def parameters(self) -> list[torch.Tensor]:
        return [t for pair in self.pairs for t in (pair if self.moved else pair[1:])]

    def take_gradients(self) -> list[torch.Tensor | None]:
        gradients = super().take_gradients()
        if not self.told and any(g is not None for g in gradients):
            self.told = True
            self._tell_of_unreached(gradients)
        return gradients

    def _tell_of_unreached(self, gradients: list[torch.Tensor | None]) -> None:
        names = [*self.names, *(f"experts.{fused.name}" for fused in self.experts)]
        unreached = [name for name, g in zip(names, gradients, strict=True) if g is None]
        if unreached:
            warnings.warn(
                f"{len(unreached)} layers ({', '.join(unreached[:4])}) were not called in the first forward, so their "
                "LoRA auxiliary does nothing: the model reads their weight itself, as kernels of fused experts do, or "
                "sent them no token",
                stacklevel=2,
            )

    def move(self, steps: Iterable[torch.Tensor | None], length: float = 1.0) -> None:
        super().move(steps, length)
        self.moved, self.constants = True, {}
        for a, _ in self.pairs:
            a.requires_grad_()

    @contextmanager
    def attached(self) -> Iterator[None]:
        fused = self.pairs[len(self.sites) :]
        inputs = _SharedInputs(partial(self._in, 0), self.rank, self.groups, self.moved)
        with ExitStack() as stack:
            stack.enter_context(forward_hooks([(site, self._hook(inputs, n)) for site, n in self.uses], True))
            for experts, (a, b) in zip(self.experts, fused, strict=True):
                stack.enter_context(with_low_rank(experts, a, b, self.scaling))
            yield
        self.groups = self.groups | inputs.found

    def state(self) -> dict[str, torch.Tensor]:
        """The groups, `(sites, longest group)`, -1 where there is none: a product's last bits depend on its shape."""
        longest = max(map(len, self.groups.values()), default=0)
        rows = [self.groups.get(n, []) for n in range(len(self.sites))]
        return {"groups": torch.tensor([row + [-1] * (longest - len(row)) for row in rows])} if longest else {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        groups = state.get("groups")
        if groups is not None and len(groups) == len(self.sites):  # else they are those of other targets
            rows = ([m for m in row if m >= 0] for row in groups.tolist())
            self.groups = {n: row for n, row in enumerate(rows) if row}

    def kept(self) -> list[torch.Tensor]:
        return [t.detach().contiguous() for pair in self.pairs for t in pair]

    def restore(self, kept: Sequence[torch.Tensor]) -> None:
        devices = [weight.device for weight in (*map(weight_of, self.sites), *(e.weight for e in self.experts))]
        pairs = zip(kept[::2], kept[1::2], devices, strict=True)
        self.pairs, self.moved, self.constants = [(a.to(device), b.to(device)) for a, b, device in pairs], True, {}

    def discard(self) -> None:
        self.pairs, self.constants = [], {}

    def _in(self, which: int, dtype: torch.dtype, n: int) -> torch.Tensor:
        """A (0) or B (1) of a site in the dtype of its layer: constants are cast together, not one by one."""
        matrix = self.pairs[n][which]
        if matrix.requires_grad or matrix.dtype == dtype:
            return matrix
        if (which, dtype) not in self.constants:
            rows = [(pair[0], pair[1].T)[which] for pair in self.pairs[: len(self.sites)]]  # as they lie in memory
            self.constants[which, dtype] = cast(rows, dtype)
        found = self.constants[which, dtype][n]
        return found.T if which else found

    def _hook(self, inputs: _SharedInputs, n: int):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, Any], y: torch.Tensor) -> Any:
            low = inputs.low(n, args[0] if args else next(iter(named.values())))
            if self.moved and _kept_by_others(module):
                y = y.clone()
            b, whole = self._in(1, y.dtype, n), _whole(y)
            if whole is None:
                return _AddLowRank.apply(y, low, b, self.scaling, self.moved)
            # a view that the model may clamp_
            return _AddLowRank.apply(whole, low, b, self.scaling, self.moved).view(y.shape)

        return hook


def _whole(y: torch.Tensor) -> torch.Tensor | None:
    """What y is another shape of, as a layer with a bias (and Conv1D) returns its product; None if it is none.

    A view can't be handed on changed in place by an autograd function, the tensor behind it can.
    """
    base = y._base if y._is_view() else None
    if base is None or base._is_view() or not (base.is_contiguous() and y.is_contiguous()):
        return None
    return base if base.numel() == y.numel() and base.shape[-1] == y.shape[-1] else None


def _kept_by_others(module: nn.Module) -> bool:
    """Whether somebody may hold on to the layer's output, which must not change under them.

    Another forward hook, or a mode that sees every operation: selective checkpointing keeps products in one.
    """
    return len(module._forward_hooks) > 1 or torch._C._len_torch_dispatch_stack() > 0


class _SharedInputs:
    """`A x` of each site in one pass; sites with one input (q, k, v; gate and up) have it read once for all.

    `matrix` gives a site's A, `(dtype, site) -> (r, in)`; `moved`: x gets a gradient through it. `groups`: number of a
    site -> those of the sites that were called with its x, one after the other, in a pass before. `found` is what this
    pass shows of them, not used before the next: a block that gradient checkpointing runs again must do what it did.
    """

    def __init__(
        self, matrix: Callable[[torch.dtype, int], torch.Tensor], rank: int, groups: dict[int, list[int]], moved: bool
    ):
        self.matrix, self.rank, self.groups, self.moved = matrix, rank, groups, moved
        self.found: dict[int, list[int]] = {}
        self.x: Callable[[], torch.Tensor | None] = lambda: None  # weak: the last input of all would outlive its block
        self.when = 0, True  # its version, and whether a graph was built
        self.group: list[int] = []  # of the sites called with this x so far
        self.ready: dict[int, torch.Tensor] = {}

    def low(self, n: int, x: torch.Tensor) -> torch.Tensor:
        """`(tokens, r)`. Each is handed out once, so that a block that runs again computes again."""
        when = x._version, torch.is_grad_enabled()
        if x is not self.x() or when != self.when:
            self.x, self.when, self.group, self.ready = weakref.ref(x), when, [], {}
        if n not in self.ready:
            members = self.groups.get(n, [n])
            stacked = _stacked([self.matrix(x.dtype, m) for m in members])
            low = F.linear(x if self.moved else x.detach(), stacked.to(x.dtype)).flatten(0, -2)
            parts = low.split(self.rank, dim=1) if len(members) > 1 else [low]
            self.ready = dict(zip(members, parts))
        self.group.append(n)
        self.found[n] = self.group
        return self.ready.pop(n)


def _stacked(matrices: list[torch.Tensor]) -> torch.Tensor:
    """Matrices `(r, in)` below one another; without a copy where they are constants that lie so in memory."""
    first = matrices[0]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for a in matrices[1:]:
        end += a.numel()
        if a.requires_grad or a.untyped_storage().data_ptr() != storage or a.storage_offset() != end:
            return torch.cat(matrices)
    return first if len(matrices) == 1 else first.as_strided((sum(map(len, matrices)), first.shape[1]), first.stride())


class _AddLowRank(torch.autograd.Function):
    """`y + scaling * low B^T`, added where y lies: no `(tokens, out)` of its own, forward or backward.

    Not `moved`, B is zero: there is no product, no bit of y changes, and B still has its gradient,
    `scaling * (dl/dy)^T low`, summed over tokens. What is kept is of r columns, and only what the backward needs.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, low: torch.Tensor, b: torch.Tensor, scaling: float, moved: bool):
        ctx.dtypes, ctx.scaling = (low.dtype, b.dtype), scaling
        low, wide = low.to(y.dtype), b.to(y.dtype) if moved else b
        ctx.save_for_backward(low if ctx.needs_input_grad[2] else None, wide if ctx.needs_input_grad[1] else None)
        if y._is_view() or not y.is_contiguous():  # a view of ours could not be changed in place by the model: clamp_
            if not moved:
                return y.clone()
            return torch.addmm(y.flatten(0, -2), low, wide.T, alpha=scaling).view(y.shape)
        ctx.mark_dirty(y)
        if moved:
            y.view(-1, y.shape[-1]).addmm_(low, wide.T, alpha=scaling)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        (grad_y,) = gradients
        grad, (low, b) = grad_y.flatten(0, -2), ctx.saved_tensors
        grad_low = None if b is None else _times(ctx.scaling, grad, b.to(grad.dtype)).to(ctx.dtypes[0])
        # (r, tokens) @ (tokens, out) takes less than half the time of its transpose on a CPU
        grad_b = None if low is None else _times(ctx.scaling, low.to(grad.dtype).T, grad).T.to(ctx.dtypes[1])
        return grad_y, grad_low, grad_b, None, None


def _times(factor: float, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`factor * left @ right` in one launch; with beta=0 what is added is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)
