"""In which precision sums, softmaxes and norms are taken, and how a number is rounded without a bias."""

import torch


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or as it is where it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def widest(device: torch.device) -> torch.dtype:
    """What sums of many numbers are taken in: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def round_at_random(tensor: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A float32 `tensor` in a 16-bit dtype, each number rounded up or down so that the mean is the number itself.

    To the nearest, steps of less than half of what the dtype resolves would all be lost, and with them what many of
    them together do.
    """
    steps = int(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)  # of float32 between two neighbours
    bits = tensor.view(torch.int32)
    noise = torch.randint(steps, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -steps).view(torch.float32).to(dtype)
