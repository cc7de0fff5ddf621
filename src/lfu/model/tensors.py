"""Many small tensors at once: a launch, or a walk through PyTorch's dispatcher, costs more than their arithmetic."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch._utils import _flatten_dense_tensors

from lfu.model.precision import wide, widest

CHUNK = 2**20  # numbers that are laid end to end: 4 MB in float32


def neighbours(tensors: Sequence[torch.Tensor], limit: float) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype and device, together up to `limit` numbers or one tensor."""
    group: list[torch.Tensor] = []
    size = 0
    for t in tensors:
        size += t.numel()
        if group and not (t.dtype == group[0].dtype and t.device == group[0].device and size <= limit):
            yield group
            group, size = [], t.numel()
        group.append(t)
    if group:
        yield group


def global_norm_tensor(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """One L2 norm over all of them, in float32 or wider a tensor, `widest` between tensors; zero for nothing.

    A scalar still on the device of the first tensor, so that the caller waits once.
    """
    found = [t for t in tensors if t is not None]
    norms = []
    for group in neighbours(found, math.inf):
        norms.append(torch.stack(torch._foreach_norm(group, 2, dtype=wide(group[0][:0]).dtype)))
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    device = found[0].device
    return torch.linalg.vector_norm(torch.cat([norm.to(device, widest(device)) for norm in norms]))


def global_norm(tensors: Sequence[torch.Tensor | None]) -> float:
    """`global_norm_tensor`, read off the device."""
    return float(global_norm_tensor(tensors))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that FSDP2 cut up (sharing its memory), or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of all products of entries, a `widest` scalar; products in float32 or wider, a chunk at a time."""
    sums, start = [], 0
    for group in neighbours(left, CHUNK):
        x = _flatten_dense_tensors(group)
        y = _flatten_dense_tensors(right[start : start + len(group)])
        for a, b in zip(x.split(CHUNK), y.split(CHUNK)):
            sums.append(torch.sum(wide(a) * wide(b), dtype=widest(a.device)).to(left[0].device))
        start += len(group)
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)


def views(flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """A flat tensor as tensors of these shapes, one behind the other."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]


def cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies in another dtype, one behind the other in memory; two launches a device."""
    found: list[torch.Tensor] = []
    for group in neighbours(tensors, math.inf):
        found += views(_flatten_dense_tensors(group).to(dtype), [tuple(t.shape) for t in group])
    return found
