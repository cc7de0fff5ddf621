"""The first-order form of the consistency (`stale`): its gradient injected into the clean backward, 2F+1B.

The exact gradient of Eq. 5 is `dc/dh' * dh'/dtheta`, for the mean square `2 (h' - h) / d * dh'/dtheta`. The undesirable
model is alpha away from theta, so `dh'/dtheta = dh/dtheta + O(alpha)`: h' is computed first, without a graph, and
`lam * dc/dh'` is added to the gradient that arrives at h in the backward of the SFT loss.

That one backward carries the sum of two gradients, so it yields no ascent direction, which is of the SFT loss alone:
the direction is one that an exact step took before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from lfu.model.tensors import global_norm
from lfu.step import second_pass
from lfu.step.consistency import Distance, Hidden, value_and_gradient
from lfu.step.gradients import SplitGradients, sample_of
from lfu.step.pieces import Rows
from lfu.step.record import Record, Skip
from lfu.step.second_pass import Micro
from lfu.undesirable import Auxiliary

if TYPE_CHECKING:
    from lfu.step.step import LfUStep


class Direction:
    """The components that the last exact step moved, and by what alpha; none yet at the start."""

    def __init__(self) -> None:
        self.components: list[torch.Tensor] = []
        self.alpha = 0.0

    def keep(self, auxiliary: Auxiliary, alpha: float) -> None:
        self.components, self.alpha = auxiliary.kept(), alpha

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs."""
        state = {f"{i:05d}": t.cpu().clone() for i, t in enumerate(self.components)}
        return state | {"alpha": torch.tensor(self.alpha, dtype=torch.float64)} if state else {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.components = [state[name] for name in sorted(state) if name != "alpha"]
        self.alpha = float(state.get("alpha", 0.0))


def run(step: LfUStep, record: Record, micro: Micro, first_pass: Callable[[], torch.Tensor]) -> None:
    """The perturbed forward without a graph, then the clean pass with its gradient injected."""
    record.form = "first-order"
    record.lam *= record.alpha / step.direction.alpha  # alpha="auto" may have changed since; the strength stays
    record.alpha = step.direction.alpha
    theta, scaler = step.anatomy.theta(), step.grad_scaler
    with step.apart(SplitGradients(sample_of(theta), theta)) as parts:
        step.auxiliary.restore(step.direction.components)
        whole = Rows(micro.batch, micro.where, {})
        with step.auxiliary.attached(), torch.no_grad(), second_pass.read(step, micro, whole) as moved:
            pass  # no graph, so no backward
        step.auxiliary.discard()
        weight = record.lam * micro.share / len(moved) / micro.items
        scale = weight if scaler is None else scaler.get_scale() * weight
        injection = Injection(moved, micro.where, step.term.per_token, scale)
        clean = step.clean(record, micro, first_pass, visit=injection)
        if record.skipped is None:
            second_pass.note_layers(record, micro, step.term.numbered(injection.sums))
            second_pass.note_move(step, record, clean, moved)
            if not math.isfinite(record.consistency):
                record.skipped = Skip.CONSISTENCY  # and nothing of it was injected
            elif not injection.reached:
                record.skipped = Skip.ABOVE
        # a broken sum of the two: the measured tensors keep what earlier micro-batches gave
        if scaler is None and not math.isfinite(global_norm([p.grad for p in parts.measured])):
            record.skip(Skip.GRADIENT)
            parts.keep = 1
    step.end(record, theta)


class Injection:
    """The `visit` of a `Reader.reading`: adds the gradient of the consistency to that of the hidden states.

    `moved` is h' `(N, d)` by layer, of the tokens at the flat positions `where` `(N,)`; `scale`, with a loss scale
    (fp16) in it, is what the sum over tokens is multiplied by in the loss.
    """

    def __init__(self, moved: Hidden, where: torch.Tensor, consistency: Distance, scale: float | torch.Tensor):
        self.moved, self.where, self.consistency, self.scale = moved, where, consistency, scale
        self.sums: Hidden = {}  # layer -> the consistency summed over tokens
        self.reached: list[int] = []  # layers whose hidden states are in the graph of theta

    def __call__(self, layer: int, hidden: torch.Tensor, h: torch.Tensor) -> None:
        with torch.autocast(h.device.type, enabled=False):  # as the exact form has it, after the forward
            self.sums[layer], gradient = value_and_gradient(self.consistency, h, self.moved[layer])
        if not hidden.requires_grad:
            return
        self.reached.append(layer)
        # a consistency that is not finite must not reach theta; no waiting for the device
        gradient = torch.where(torch.isfinite(self.sums[layer]), gradient * self.scale, 0.0)
        where = self.where.to(hidden.device)

        def add(arriving: torch.Tensor) -> torch.Tensor:
            flat = arriving.flatten(0, 1)
            return flat.index_add(0, where, gradient.to(flat.dtype)).view(arriving.shape)

        hidden.register_hook(add)
