"""The first-order form of the consistency: its gradient injected into the clean backward, 2F+1B.

The exact gradient of Eq. 5 is `dc/dh' * dh'/dtheta`, for the mean square `2 (h' - h) / d * dh'/dtheta`. The undesirable
model is alpha away from theta, so `dh'/dtheta = dh/dtheta + O(alpha)`: h' is computed first, without a graph, and
`lam * dc/dh'` is added to the gradient that arrives at h in the backward of the SFT loss.

That one backward carries the sum of two gradients, so it yields no ascent direction, which is of the SFT loss alone:
the direction is one that an exact step took before.
"""

from __future__ import annotations

import torch

from lfu.step.consistency import Distance, gradient_of


class Injection:
    """The `visit` of a `Reader.reading`: adds the gradient of the consistency to that of the hidden states.

    Args:
        moved: layer -> h' `(N, d)`.
        where: `(N,)`, the positions of its tokens in the clean pass.
        consistency: of `(N, d), (N, d)`.
        scale: what the sum over tokens is multiplied by in the loss, a loss scale (fp16) included.

    Attributes:
        sums: layer -> the consistency summed over tokens.
        reached: layers whose hidden states are in the graph of theta.
    """

    def __init__(
        self,
        moved: dict[int, torch.Tensor],
        where: torch.Tensor,
        consistency: Distance,
        scale: float | torch.Tensor,
    ):
        self.moved, self.where, self.consistency, self.scale = moved, where, consistency, scale
        self.sums: dict[int, torch.Tensor] = {}
        self.reached: list[int] = []

    def __call__(self, layer: int, hidden: torch.Tensor, h: torch.Tensor) -> None:
        with torch.autocast(h.device.type, enabled=False):  # as the exact form has it, after the forward
            self.sums[layer], gradient = gradient_of(self.consistency, h, self.moved[layer])
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
