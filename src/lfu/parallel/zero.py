"""LfU under DeepSpeed, ZeRO-1 to ZeRO-3: as under DDP and FSDP2 (see several.py), but no reduction is put off.

DeepSpeed reduces, averages and cuts up the gradient of theta in hooks on its backward, and adds what comes to what it
has: ZeRO-2 and ZeRO-3 after each backward, ZeRO-1 at the end of an update. LfU's two backwards are to it two
micro-batches of one update: the first of them must not end the update. So under ZeRO-2 and ZeRO-3 theta's gradient is
sent twice as often as by SFT. They have a way to put that off (`coalesce_grad_reduction`), which is not used: whole
gradients would stay in every process, and that none does is what they are used for. (What stays is the sample on which
the gradient ratio is measured, see `gradients.sample_of`, until the second backward.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lfu.parallel.several import Several


class Zero(Several):
    """Processes that DeepSpeed holds together: the model is its `DeepSpeedEngine`."""

    def wrap(self, model: Any) -> None:
        self.wrapper = model
        self.sharded = model.zero_optimization_stage() == 3

    def unwrapped(self, model: nn.Module) -> Any:
        return model.module if model is self.wrapper else model

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it a backward is a micro-batch in the middle of an update."""
        self._pending = ends = self.reducing()
        state = self.accelerator.gradient_state
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(ends)

    def _end(self, inner: nn.Module) -> torch.Tensor | None:
        """Of ZeRO-3, whose weights are whole only while they are used: a zero of its own.

        The engine makes ready for a backward where a gradient reaches an output of its forward, and this is one.
        """
        return 1.0 * torch.zeros((), device=self.device, requires_grad=True) if self.sharded else super()._end(inner)
