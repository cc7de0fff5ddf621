"""LfU in several processes: one ascent direction, one gradient reduction an update, one mind about bad batches.

DDP and FSDP2 reduce the gradients of theta in hooks on its backward. LfU has two backwards a micro-batch and an
auxiliary that those hooks don't know, so:

- the clean pass (and whatever the ascent needs) runs without a reduction; the perturbed backward, which goes through
  the wrapper as every forward of SFT does, then reduces the sum of both: SFT's communication;
- the auxiliary's gradient, which is small, is summed over the processes (`ascent_scope="global"`), so that all take
  one and the same step: that of one process with the whole batch. With `local` each takes the step of its own part;
- whatever decides how many passes follow (a non-finite loss, no labelled token) is agreed on first. A process that
  went its own way would leave the others waiting for ever.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lfu.model.representations import hidden_of
from lfu.model.tensors import neighbours
from lfu.parallel.one import OneProcess, touch
from lfu.parallel.refusals import refuse_in_several
from lfu.parallel.taps import Taps

COALESCED = 2**23  # numbers that go into one all-reduce together


def processes_of(model: nn.Module, scope: str = "global") -> OneProcess:
    """`Several` for a model wrapped by DDP or FSDP2, else `OneProcess`.

    Raises ValueError: DDP's `static_graph`; DeepSpeed's engine.
    """
    if type(model).__name__ == "DeepSpeedEngine":  # which need not be installed
        raise ValueError("LfUStep can't tell DeepSpeed's engine where an update ends: use LfUTrainer, or DDP or FSDP2")
    return Several(model, scope) if isinstance(model, DistributedDataParallel | FSDPModule) else OneProcess()


def several(trainer: Any) -> bool:
    """Whether the trainer's model will be in a wrapper of DDP, FSDP or DeepSpeed."""
    return trainer.accelerator.num_processes > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


class Several(OneProcess):
    """Processes that each hold a part of every micro-batch, under DDP or FSDP2 (`scope`: see the module).

    An `accelerator` knows when an update ends. Without one: when DDP's `no_sync` says; FSDP2: after each micro-batch.
    Raises ValueError: a model in no wrapper; DDP's `static_graph`.
    """

    alone = False

    def __init__(self, model: nn.Module, scope: str = "global", accelerator: Any = None):
        self.scope, self.accelerator, self.each = scope, accelerator, False
        self.wrap(model)
        self.size = dist.get_world_size()
        self.device = next(model.parameters()).device  # of the small messages
        if accelerator is not None:
            self.device = accelerator.device
            # FSDP2: reduce after each backward (twice SFT's communication), as deferring holds unsharded gradients
            self.each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        self._taps: Taps | None = None
        self._tail: torch.Tensor | None = None
        self._pending = False

    def wrap(self, model: nn.Module) -> None:
        """Take note of the wrapper that forwards go through."""
        self.wrapper: Any = model
        self.sharded = isinstance(model, FSDPModule)
        if not (self.sharded or isinstance(model, DistributedDataParallel)):
            raise ValueError(f"several processes, and {type(model).__name__} is in neither DDP nor FSDP2: wrap it")
        if getattr(model, "static_graph", False):
            raise ValueError("DDP's static_graph: LfU's two passes are two graphs: leave it off")

    def check(self, own: bool, reads_logits: bool, stale: int) -> None:
        refuse_in_several(own, reads_logits, stale, "FSDP" if self.sharded else "")

    def unwrapped(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    # -- when theta's gradient is reduced ------------------------------------------------------------------------------

    def reducing(self) -> bool:
        """Whether the current micro-batch ends with a reduction, for gradient accumulation."""
        if self.accelerator is not None:
            return self.accelerator.sync_gradients
        return bool(getattr(self.wrapper, "require_backward_grad_sync", True))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._pending = self.reducing() and not (self.sharded and self.each)
        if not self._pending:  # within a no_sync already, or not wanted
            yield
        elif self.sharded:
            self.wrapper.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                self.wrapper.set_requires_gradient_sync(True)
        else:
            with self.wrapper.no_sync():
                yield

    def through(self, batch: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        inner = self.unwrapped(self.wrapper)
        found: list[Any] = []

        def instead(*_: Any, **__: Any) -> Any:
            found.append(run())
            return found, self._end(inner)

        if self._taps is not None:
            self._taps.second = True
        with mock.patch.object(inner, "forward", instead):
            (result,), self._tail = self.wrapper(batch["input_ids"])
        return result

    def _end(self, inner: nn.Module) -> torch.Tensor | None:
        """A zero for the loss: DDP waits for every parameter, also for those that the perturbed pass does not reach."""
        return None if self.sharded else touch([p for p in inner.parameters() if p.requires_grad])

    def joined(self, loss: torch.Tensor, goes_on: bool) -> torch.Tensor:
        self._pending = False
        loss = loss if goes_on else 0.0 * loss
        return loss if self._tail is None else loss + self._tail

    def settle(self, batch: Mapping[str, Any], decoder: nn.Module, backward: Callable[[torch.Tensor], Any]) -> None:
        if not self._pending:
            return
        if isinstance(self.wrapper, FSDPModule):  # one token of one row: it reduces where a backward through it ends
            one = {"input_ids": batch["input_ids"][:1, :1]}
            loss = 0.0 * self.through(batch, lambda: hidden_of(decoder(**one, use_cache=False))).float().sum()
        else:
            loss = self._reaching_all(batch)
        self._pending, self._tail = False, None
        backward(loss)

    # -- what is agreed on ---------------------------------------------------------------------------------------------

    def summed(self, numbers: Sequence[float]) -> list[float]:
        message = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(message)
        return message.tolist()

    def nothing(self, batch: Mapping[str, Any], theta: Sequence[nn.Parameter]) -> torch.Tensor:
        """It reaches all of theta, so that what earlier micro-batches have left is reduced where this one should."""
        if self.sharded:
            two = torch.zeros((1, 2), dtype=torch.long, device=self.device)
            return 0.0 * self.wrapper(input_ids=two, use_cache=False).logits.float().sum()
        return self._reaching_all(batch)

    def _reaching_all(self, batch: Mapping[str, Any]) -> torch.Tensor:
        self.through(batch, lambda: None)
        assert self._tail is not None
        return self._tail

    def direction(
        self, gradients: list[torch.Tensor | None], parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        if self.scope == "local":
            return gradients
        summed: list[torch.Tensor | None] = []
        # an expert that no token of this process reached has no gradient here, and one elsewhere
        whole = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters)]
        for group in neighbours(whole, COALESCED):
            flat = _flatten_dense_tensors(group)
            dist.all_reduce(flat)
            summed += _unflatten_dense_tensors(flat, group)
        return summed

    def taps(self, measured: Sequence[nn.Parameter], theta: Sequence[nn.Parameter], own: bool) -> Taps:
        self._taps = Taps(self, measured, theta, own)
        return self._taps

    def gathered(self, numbers: Sequence[float]) -> list[list[float]]:
        everyone = torch.zeros(self.size, len(numbers), dtype=torch.float64, device=self.device)
        everyone[dist.get_rank()] = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(everyone)
        return everyone.tolist()
