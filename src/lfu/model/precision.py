"""The precision that sums, softmaxes and norms are taken in."""

from __future__ import annotations

import torch


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or as it is where it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
