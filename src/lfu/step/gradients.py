"""The two gradients of a micro-batch kept apart: SFT's and the consistency's, on theta or a sample of it.

In the 2F+2B order they come from two backwards, so both are there to see: the record's ratio and cosine. And a part
that is not finite can be left out: no NaN ever reaches the weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from lfu.model.anatomy import whole_shape
from lfu.model.tensors import dot, global_norm, global_norm_tensor, local
from lfu.step.record import Record, Skip

# Up to this many elements theta is measured whole: 2^25 float32 gradients are 128 MB. LoRA of rank 8 on all linear
# layers of an 8 B model, the paper's setting, has 21 million.
WHOLE = 2**25
# A larger theta is sampled: a 32nd of it, at least so many elements and at most `WHOLE`.
SAMPLE, SHARE = 2**22, 32

# reason -> how many parts of the measured gradients stay: earlier micro-batches' alone, or SFT's, too
SOUND_PARTS = {
    Skip.ASCENT: 1,
    Skip.GRADIENT: 1,
    Skip.CONSISTENCY: 2,  # of a piece; those before it had their backward
    Skip.CONSISTENCY_GRADIENT: 2,
}


def sample_of(theta: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The tensors of theta whose two gradients are kept apart: all of them up to `WHOLE` elements.

    So a LoRA theta is measured whole. Of a larger one whole tensors are drawn, at least one, with a fixed seed: they
    are the same in each step and each run of a model.
    """
    sizes = {p: whole_shape(p).numel() for p in theta}
    total = sum(sizes.values())
    if total <= WHOLE:
        return list(theta)
    order = torch.randperm(len(theta), generator=torch.Generator().manual_seed(0)).tolist()
    chosen, room = [], min(WHOLE, max(SAMPLE, total // SHARE))
    for p in (theta[i] for i in order):
        if sizes[p] <= room:
            chosen.append(p)
            room -= sizes[p]
    return chosen or [min(theta, key=sizes.__getitem__)]


class SplitGradients:
    """Keeps what earlier micro-batches, the SFT backward and the consistency backward left on theta apart.

    By moving `.grad` tensors aside, not by copying them: a backward that finds None writes a fresh tensor. `join`
    adds the parts up again; until then a plain `optimizer.step()` would miss some.

    The parts of `measured` alone are kept apart; the gradients of the rest of `theta` just accumulate.
    """

    def __init__(self, measured: Sequence[nn.Parameter], theta: Sequence[nn.Parameter]):
        self.measured, self.theta = list(measured), theta
        self.keep: int | None = None  # how many parts `join` adds up, from the first on; None for all
        self.parts: list[list[torch.Tensor | None]] = []
        self.finite = False  # both parts, as far as compared
        self.others: list[tuple[nn.Parameter, torch.Tensor | None, int]] = []
        self.set_aside()

    def set_aside(self) -> None:
        """What is on the measured tensors now becomes a part of its own."""
        self.parts.append([p.grad for p in self.measured])
        for p in self.measured:
            p.grad = None
        self._look_at_others()

    def _look_at_others(self) -> None:
        """Remembers what is on the tensors that are not measured: a backward adds in place, which counts versions."""
        self.others = [(p, p.grad, _version(p.grad)) for p in self._not_measured()]

    def _not_measured(self) -> list[nn.Parameter]:
        measured = {id(p) for p in self.measured}
        return [p for p in self.theta if id(p) not in measured]

    def narrow(self, measured: Sequence[nn.Parameter]) -> None:
        """From now on keep the parts of these alone apart; those of the others are added up, and freed."""
        chosen = {id(p) for p in measured}
        stay = [i for i, p in enumerate(self.measured) if id(p) in chosen]
        leave = [i for i, p in enumerate(self.measured) if id(p) not in chosen]
        parts = [*self.parts, [p.grad for p in self.measured]]
        for i, total in zip(leave, _sums([[part[i] for i in leave] for part in parts])):
            self.measured[i].grad = total
        self.measured = [self.measured[i] for i in stay]
        self.parts = [[part[i] for i in stay] for part in self.parts]
        self._look_at_others()

    def compare(self) -> tuple[float, float, float]:
        """`(||g_sft||, ||g_cons||, cosine)`: the second part, and what came since. The cosine is 0 where undefined."""
        sft, cons = self.parts[1], [p.grad for p in self.measured]
        both = [(x, y) for x, y in zip(sft, cons) if x is not None and y is not None]
        a, b = global_norm_tensor(sft), global_norm_tensor(cons)
        product_of = dot([x for x, _ in both], [y for _, y in both])
        norm_a, norm_b, product = torch.stack([t.to(a.device, a.dtype) for t in (a, b, product_of)]).tolist()
        self.finite = math.isfinite(norm_a) and math.isfinite(norm_b)
        scale = norm_a * norm_b
        return norm_a, norm_b, product / scale if scale > 0 and math.isfinite(product) else 0.0

    def unsure(self) -> Sequence[nn.Parameter]:
        """What of theta may have a gradient that is not finite: all but what `compare` found finite in both parts.

        A norm in float32 is finite only below 2e19 an entry, which no sum takes to float32's or bfloat16's end; in
        float16 two finite gradients may add up to infinity.
        """
        if not self.finite or any(p.dtype == torch.float16 for p in self.measured):
            return self.theta
        return self._not_measured()

    def undo(self) -> bool:
        """Drops what came since the newest part. False where a backward has reached tensors that are not measured."""
        if any(p.grad is not grad or _version(grad) != version for p, grad, version in self.others):
            return False
        for p in self.measured:
            p.grad = None
        return True

    def abandon(self) -> None:
        """Leaves the first part alone on `.grad`; nothing at all where some of theta is not measured."""
        self.keep = 1
        self.join()
        if len(self.measured) < len(self.theta):
            for p in self.theta:
                p.grad = None

    def join(self) -> None:
        """Puts the sum of the parts, what is there now among them, on `.grad`. A second call does nothing."""
        if not self.parts:
            return
        self.set_aside()
        for p, total in zip(self.measured, _sums(self.parts[: self.keep])):
            p.grad = total
        self.parts, self.others = [], []


def _version(grad: torch.Tensor | None) -> int:
    return 0 if grad is None else grad._version


def _sums(parts: Sequence[Sequence[torch.Tensor | None]]) -> list[torch.Tensor | None]:
    """The parts added up, tensor by tensor, in the memory of the first; None is nothing."""
    total = list(parts[0])
    for part in parts[1:]:
        pairs = [(t, g) for t, g in zip(total, part) if t is not None and g is not None]
        if pairs:
            torch._foreach_add_([t for t, _ in pairs], [g for _, g in pairs])
        total = [g if t is None else t for t, g in zip(total, part)]
    return total


def check_finite(record: Record, theta: Sequence[nn.Parameter]) -> None:
    """The last word, over all of theta: entries that are not finite become zero, and the record says so."""
    gradients = [local(p.grad) for p in theta if p.grad is not None]
    if gradients and not math.isfinite(global_norm(gradients)):
        record.skip(Skip.GRADIENT)
        for g in gradients:
            g.nan_to_num_(0.0, 0.0, 0.0)
