"""Eq. 2: one normalised gradient-ASCENT step on the auxiliary components."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lfu.undesirable.auxiliary import Auxiliary


def global_norm(tensors: Sequence[torch.Tensor | None]) -> float:
    """One L2 norm over all of them, summed in float64; 0.0 for nothing."""
    norms = [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in tensors if t is not None]
    if not norms:
        return 0.0
    return math.sqrt(math.fsum(n**2 for n in torch.stack([n.double().cpu() for n in norms]).tolist()))


def _wide(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def ascend(auxiliary: Auxiliary, gradients: Sequence[torch.Tensor | None], alpha: float) -> float:
    """`aux <- aux + alpha * g / ||g||_2`, one global norm over all of aux.

    Args:
        gradients: of the SFT loss, in the order of `auxiliary.parameters()`; None counts as zero. A loss scale
            (fp16) on them cancels out.
        alpha: length of the step, in the L2 norm over all components together.

    Returns:
        `||g||_2`. Where it is zero or not finite nothing is moved: the caller decides what then.
    """
    norm = global_norm(gradients)
    if norm == 0.0 or not math.isfinite(norm):
        return norm
    auxiliary.move(None if g is None else g * (alpha / norm) for g in gradients)  # one step in memory at a time
    return norm
