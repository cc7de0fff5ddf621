"""Items dealt over the processes of a run: each measures its part, and all learn the whole."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")


class Dealer:
    """Deals items over the processes that hold the same model; alone it has them all."""

    def __init__(self, model: Any = None):  # whose tensor-parallel processes, if any, must all see the same items
        together = dist.is_available() and dist.is_initialized() and (getattr(model, "tp_size", None) or 1) == 1
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    def over(self, items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R]:
        """`work(items)`, one result an item, in order. All parts are of one length, so sharded models stay in step."""
        if self.size == 1 or not items:
            return work(list(items)) if items else []
        each = -(-len(items) // self.size)
        mine = work([items[(i * self.size + self.rank) % len(items)] for i in range(each)])
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, mine)
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def agreed(self, value: T) -> T:
        """The first process's `value`, in all: what decides on the items must not differ."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]
