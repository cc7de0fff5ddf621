"""Eq. 2: one normalised gradient-ASCENT step on the auxiliary components."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lfu.model.tensors import norms
from lfu.undesirable.auxiliary import Auxiliary


def global_norm(tensors: Sequence[torch.Tensor | None]) -> float:
    """One L2 norm over all of them, in float32 or wider a tensor, float64 between tensors; 0.0 for nothing."""
    return float(global_norm_tensor(tensors))


def global_norm_tensor(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """`global_norm` as a float64 scalar still on the device of the first tensor, so that the caller waits once."""
    found = [t for t in tensors if t is not None]
    return torch.linalg.vector_norm(norms(found)) if found else torch.zeros((), dtype=torch.float64)


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
    auxiliary.move(gradients, alpha / norm)
    return norm
