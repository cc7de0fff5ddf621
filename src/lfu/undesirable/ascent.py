"""Eq. 2: one normalised gradient-ASCENT step on the auxiliary components."""

import math
from collections.abc import Sequence

import torch

from lfu.model.tensors import global_norm
from lfu.undesirable.auxiliary import Auxiliary


def ascend(auxiliary: Auxiliary, gradients: Sequence[torch.Tensor | None], alpha: float) -> float:
    """`aux <- aux + alpha * g / ||g||_2`, one global L2 norm over all of aux, which is returned.

    `gradients` are those of the SFT loss, in the order of `auxiliary.parameters()`; None counts as zero. A loss scale
    (fp16) on them cancels out. Where the norm is zero or not finite nothing is moved: the caller decides what then.
    """
    norm = global_norm(gradients)
    if norm > 0 and math.isfinite(norm):
        auxiliary.move(gradients, alpha / norm)
    return norm
