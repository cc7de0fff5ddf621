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

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lfu.model.precision import wide
from lfu.model.representations import hidden_of
from lfu.model.tensors import neighbours
from lfu.step.strength import SplitGradients, sample_of
from lfu.support.choices import CHOICES, one_of
from lfu.undesirable.ascent import global_norm_tensor

if TYPE_CHECKING:
    from lfu.step.step import Record

# why a micro-batch was skipped, as step.py says it: a number travels, not a text
REASONS = (
    "no labelled token",
    "zero ascent gradient",
    "theta lies above the compared layers",
    "non-finite loss",
    "non-finite ascent gradient",
    "non-finite consistency",
    "non-finite gradient",
    "non-finite consistency gradient",
)
COALESCED = 2**23  # numbers that go into one all-reduce together


def processes_of(model: nn.Module, scope: str = "global") -> OneProcess:
    """`Several` for a model wrapped by DDP or FSDP2, else `OneProcess`.

    Raises:
        ValueError: unknown scope; DDP's `static_graph`; DeepSpeed's engine.
    """
    if type(model).__name__ == "DeepSpeedEngine":  # which need not be installed
        raise ValueError("LfUStep can't tell DeepSpeed's engine where an update ends: use LfUTrainer, or DDP or FSDP2")
    return Several(model, scope) if isinstance(model, DistributedDataParallel | FSDPModule) else OneProcess()


def refuse_launch(trainer: Any) -> None:
    """Ways to run several processes that LfU and SAM can't work under.

    Raises:
        ValueError: DataParallel, FSDP 1, tensor, context or sequence parallelism, a model sharded while it
            was loaded.
    """
    method, works = trainer.args.method, "use DDP, or FSDP with fsdp_version 2"
    if trainer.args.n_gpu > 1:  # one process: under a launcher each has one
        raise ValueError(
            f"method {method!r} can't run under nn.DataParallel, which one process on {trainer.args.n_gpu} GPUs means: "
            "start it by accelerate launch, or on one GPU by CUDA_VISIBLE_DEVICES=0"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"method {method!r} can't run round the flat parameters of FSDP 1: set fsdp_version: 2")
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(f"method {method!r} needs accelerate to shard the model, not a distributed_config: {works}")
    if (
        trainer.accelerator.num_processes > 1
        and max(trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()) > 1
    ):
        raise ValueError(f"method {method!r} splits batches over processes, not layers or sequences: {works}")


def refuse_on_shards(own: bool, reads_logits: bool, by: str = "FSDP") -> None:
    """Raises ValueError for what cut-up weights and gradients don't allow; the message names what works."""
    if own:
        raise ValueError(
            f"auxiliary='own' moves whole weights by whole gradients, and {by} cuts them up: use auxiliary='lora' or "
            "'steering', or DDP"
        )
    if reads_logits:
        raise ValueError(
            f"consistency='logit_kl' runs the head by itself, whose weight {by} cuts up: use 'mse', 'cosine' or "
            "'contrastive', or DDP"
        )


def refuse_stale(stale: int) -> None:
    """Raises ValueError for the first-order form: its one backward would have to be agreed on."""
    if stale:
        raise ValueError(
            f"stale={stale} runs in one process: under DDP, FSDP and DeepSpeed use every, part or random_layers"
        )


def several(trainer: Any) -> bool:
    """Whether the trainer's model will be in a wrapper of DDP, FSDP or DeepSpeed."""
    return trainer.accelerator.num_processes > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def of_trainer(trainer: Any, model: nn.Module) -> Several:
    """The processes of a trainer whose model is in its wrapper now."""
    accelerator = trainer.accelerator
    return Several(
        model,
        trainer.args.ascent_scope,
        reducing=lambda: accelerator.sync_gradients,
        each=accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False),
        device=accelerator.device,
    )


class OneProcess:
    """Nobody to agree with: every question is answered by this process alone."""

    size = 1
    alone = True

    def unwrapped(self, model: nn.Module) -> nn.Module:
        """The model inside its wrapper."""
        return model

    def deferred(self) -> AbstractContextManager[None]:
        """Within it, backward passes leave the reduction of theta's gradient to a later one."""
        return nullcontext()

    def finite(self, loss: torch.Tensor) -> bool:
        """Whether the losses of all processes are finite."""
        return bool(torch.isfinite(loss))

    def anyone(self, record: Record) -> bool:
        """Whether one of the processes goes on; then all must, those that would skip with weight 0."""
        return record.skipped is None

    def nothing(self, batch: Mapping[str, Any], theta: Sequence[nn.Parameter]) -> torch.Tensor:
        """A zero to go backward from in place of a loss that is not finite; theta may lie on several devices."""
        return touch(theta)

    def mean(self, count: float) -> float:
        """A count, averaged over the processes."""
        return count

    def total(self, count: float) -> float:
        """A count, summed over the processes that the ascent looks at."""
        return count

    def check(self, own: bool, reads_logits: bool, stale: int) -> None:
        """Raises ValueError for what can't be done right here; the message names what can."""

    def direction(
        self, gradients: list[torch.Tensor | None], parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """The ascent gradient: this process's, or the sum over all."""
        return gradients

    def split(self, theta: list[nn.Parameter], own: bool) -> Any:
        """What tells the SFT backward's gradient from the consistency backward's."""
        return SplitGradients(theta if own else sample_of(theta), theta)

    def through(self, batch: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """`run`, a forward of parts of the model, with all that the wrapper does round a forward."""
        return run()

    def joined(self, loss: torch.Tensor, record: Record) -> torch.Tensor:
        """The loss of the perturbed pass as backward should see it."""
        return loss

    def settle(self, batch: Mapping[str, Any], decoder: nn.Module, backward: Callable[[torch.Tensor], Any]) -> None:
        """At the end of a micro-batch: a reduction that was deferred and not made up for is made now."""

    def share(self, record: Record) -> None:
        """The record of this process's part becomes that of all."""


class Several(OneProcess):
    """Processes that each hold a part of every micro-batch, under DDP or FSDP2.

    Args:
        model: the wrapper: `DistributedDataParallel`, or what `fully_shard` returned.
        scope: `global` or `local`, see the module.
        reducing: says whether the current micro-batch ends with a reduction, for gradient accumulation. Default: what
            DDP's `no_sync` says; always for FSDP2.
        each: reduce after each backward (FSDP2; twice SFT's communication): deferring holds unsharded gradients.
        device: of the small messages. Default: that of the model.

    Raises:
        ValueError: unknown scope; DDP's `static_graph`.
    """

    alone = False

    def __init__(
        self,
        model: nn.Module,
        scope: str = "global",
        *,
        reducing: Callable[[], bool] | None = None,
        each: bool = False,
        device: torch.device | None = None,
    ):
        one_of("ascent_scope", scope, CHOICES["ascent_scope"])
        self.scope, self.each = scope, each
        self.wrap(model)
        self.size = dist.get_world_size()
        self.reducing = reducing or (lambda: bool(getattr(self.wrapper, "require_backward_grad_sync", True)))
        self.device = device or next(model.parameters()).device
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
        refuse_stale(stale)
        if self.sharded:
            refuse_on_shards(own, reads_logits)

    def unwrapped(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    # -- when theta's gradient is reduced ------------------------------------------------------------------------------

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
        with _forward_of(inner, instead):
            (result,), self._tail = self.wrapper(batch["input_ids"])
        return result

    def _end(self, inner: nn.Module) -> torch.Tensor | None:
        """A zero for the loss: DDP waits for every parameter, also for those that the perturbed pass does not reach."""
        return None if self.sharded else touch([p for p in inner.parameters() if p.requires_grad])

    def joined(self, loss: torch.Tensor, record: Record) -> torch.Tensor:
        self._pending = False
        loss = loss if record.skipped is None else 0.0 * loss
        return loss if self._tail is None else loss + self._tail

    def settle(self, batch: Mapping[str, Any], decoder: nn.Module, backward: Callable[[torch.Tensor], Any]) -> None:
        if not self._pending:
            return
        if isinstance(self.wrapper, FSDPModule):  # one token of one row: it reduces where a backward through it ends
            one = {"input_ids": batch["input_ids"][:1, :1]}
            loss = 0.0 * self.through(batch, lambda: hidden_of(decoder(**one, use_cache=False))).float().sum()
        else:
            self.through(batch, lambda: None)
            assert self._tail is not None
            loss = self._tail
        self._pending, self._tail = False, None
        backward(loss)

    # -- what is agreed on ---------------------------------------------------------------------------------------------

    def _sum(self, numbers: Sequence[float]) -> list[float]:
        message = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(message)
        return message.tolist()

    def finite(self, loss: torch.Tensor) -> bool:
        return self._sum([float(not torch.isfinite(loss))]) == [0.0]

    def nothing(self, batch: Mapping[str, Any], theta: Sequence[nn.Parameter]) -> torch.Tensor:
        """It reaches all of theta, so that what earlier micro-batches have left is reduced where this one should."""
        if self.sharded:
            two = torch.zeros((1, 2), dtype=torch.long, device=self.device)
            return 0.0 * self.wrapper(input_ids=two, use_cache=False).logits.float().sum()
        self.through(batch, lambda: None)
        assert self._tail is not None
        return self._tail

    def anyone(self, record: Record) -> bool:
        return self._sum([float(record.skipped is None)])[0] > 0

    def mean(self, count: float) -> float:
        return self._sum([count])[0] / self.size

    def total(self, count: float) -> float:
        return self._sum([count])[0] if self.scope == "global" else count

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

    def split(self, theta: list[nn.Parameter], own: bool) -> Taps:
        self._taps = Taps(self.unwrapped(self.wrapper), theta, own, self.sharded, self._sum)
        return self._taps

    def share(self, record: Record) -> None:
        """Means over all answer tokens; `skipped` if no process went on, or a non-finite value shows in one."""
        layers, displaced = list(record.consistency_per_layer), list(record.displacement)
        message = [
            record.tokens,
            -1 if record.skipped is None else REASONS.index(record.skipped),
            record.sft_loss,
            *record.consistency_per_layer.values(),
            *(value**2 for value in record.displacement.values()),
        ]
        everyone = torch.zeros(self.size, len(message), dtype=torch.float64, device=self.device)
        everyone[dist.get_rank()] = torch.tensor(message, dtype=torch.float64)
        dist.all_reduce(everyone)
        tokens, codes, losses, *rest = everyone.T.tolist()
        record.skipped = _reason([int(code) for code in codes])
        record.tokens = int(sum(tokens))
        record.sft_loss = _mean(losses, tokens)
        means = [_mean(column, tokens) for column in rest]
        record.consistency_per_layer = dict(zip(layers, means))
        record.consistency = math.fsum(means[: len(layers)]) / max(len(layers), 1)
        record.displacement = {layer: math.sqrt(m) for layer, m in zip(displaced, means[len(layers) :])}


class Taps:
    """What `SplitGradients` is to one process: the two gradients of theta measured as they arrive, by tensor hooks.

    A reducer must find the sum of all parts in `.grad` (FSDP2 keeps it out of sight), so none is put aside; only for
    the `own` auxiliary that of earlier micro-batches, during the clean pass: its ascent needs this one's alone.

    The figures are those of all processes' gradients before they are averaged, laid end to end: three numbers are
    summed instead of a gradient, and every process sees the same ratio.

    Args:
        model: inside its wrapper.
        theta: its trainable parameters; `sample_of` them is measured.
        own: the ascent moves theta.
        sharded: FSDP2 and ZeRO-3, whose whole parameters exist only while a module runs.
        total: sums numbers over the processes.
    """

    def __init__(
        self,
        model: nn.Module,
        theta: list[nn.Parameter],
        own: bool,
        sharded: bool,
        total: Callable[[Sequence[float]], list[float]],
    ):
        self.total, self.theta, self.second = total, theta if own else [], False
        # the first backward's gradient and its square: autograd may add the second's to it where it lies
        self.first: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self.sums: dict[Any, torch.Tensor] = {}  # (cons . cons, sft . cons), float64
        self.handles: list[Any] = []
        self.tapped: set[int] = set()
        self.earlier = [p.grad for p in self.theta]
        for p in self.theta:
            p.grad = None
        measured = sample_of(theta)
        if sharded:
            chosen = {id(p) for p in measured}
            for module in model.modules():
                names = [name for name, p in module.named_parameters(recurse=False) if id(p) in chosen]
                if names:
                    self.handles.append(module.register_forward_pre_hook(self._when_whole(names)))
        else:
            for p in measured:
                self._tap(p)

    def _when_whole(self, names: list[str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            for name in names:
                self._tap(getattr(module, name))

        return hook

    def _tap(self, p: torch.Tensor) -> None:
        if id(p) not in self.tapped and p.requires_grad:
            self.tapped.add(id(p))
            self.handles.append(p.register_hook(lambda gradient: self._arrived(id(p), gradient.detach())))

    def _arrived(self, key: int, gradient: torch.Tensor) -> None:
        if not self.second:
            self.first[key] = gradient, _squared(gradient)
            return
        before, _ = self.first.get(key, (None, None))
        squared = _squared(gradient)
        both = None if before is None else wide(before) * wide(gradient)
        dot = torch.zeros_like(squared) if both is None else both.sum(dtype=torch.float64)
        self.sums[key] = torch.stack([squared, dot])

    def set_aside(self) -> None:
        """The clean pass is over: `.grad` is again the sum with earlier micro-batches."""
        for p, before in zip(self.theta, self.earlier):
            if before is not None:
                p.grad = before if p.grad is None else before.add_(p.grad)
        self.theta, self.earlier = [], []

    def undo(self) -> bool:
        """Never: what has come since is in the sum."""
        return False

    def narrow(self, measured: Sequence[nn.Parameter]) -> None:
        """Nothing is kept that could be given up."""

    def abandon(self, theta: Sequence[nn.Parameter]) -> None:
        """After an error: nothing of this update is left, as its parts can't be told apart."""
        self.join()
        for p in theta:
            p.grad = None

    def compare(self) -> tuple[float, float, float]:
        """`(||g_sft||, ||g_cons||, cosine)`, as `SplitGradients.compare`; the same in every process."""
        sft = float(torch.stack([squared for _, squared in self.first.values()]).sum()) if self.first else 0.0
        found = torch.stack(list(self.sums.values())).sum(0).tolist() if self.sums else [0.0, 0.0]
        a, b, dot = self.total([sft, *found])
        scale = math.sqrt(a) * math.sqrt(b) if a >= 0 and b >= 0 else math.nan  # NaN is not >= 0
        cosine = dot / scale if scale > 0 and math.isfinite(dot / scale) else 0.0
        return math.sqrt(a) if a >= 0 else math.nan, math.sqrt(b) if b >= 0 else math.nan, cosine

    def all_finite(self, theta: Sequence[nn.Parameter]) -> bool:
        """Not known: what the reducer has made of them is in `.grad`."""
        return False

    def join(self, keep: int | None = None) -> None:
        """Hooks off. `keep` has no effect: what a reducer has summed can't be taken apart."""
        self.set_aside()
        for handle in self.handles:
            handle.remove()
        self.handles, self.first, self.sums = [], {}, {}


# -- small parts -------------------------------------------------------------------------------------------------------


class _Touch(torch.autograd.Function):
    """Zero, with a gradient of zeros for everything it is given (one number each in memory)."""

    @staticmethod
    def forward(ctx: Any, *theta: torch.Tensor) -> torch.Tensor:
        ctx.theta = [(p.shape, p.dtype, p.device) for p in theta]
        return torch.zeros((), device=theta[0].device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple(torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.theta)


def touch(theta: Sequence[torch.Tensor]) -> torch.Tensor:
    """A zero whose backward reaches every tensor of theta, on whatever devices, so that a reducer sees all of them."""
    return _Touch.apply(*theta)


@contextmanager
def _forward_of(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Calls of `module` run `instead`, with its hooks and wrappers round it."""
    own = vars(module).get("forward")  # libraries patch it on the instance
    module.forward = instead
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _squared(gradient: torch.Tensor) -> torch.Tensor:
    return global_norm_tensor([gradient]).square()


def _reason(codes: Sequence[int]) -> str | None:
    """Why all processes together skipped: for a non-finite value in one of them, or because none went on."""
    told = [REASONS[code] for code in codes if code >= 0]
    broken = [reason for reason in told if "non-finite" in reason]
    return broken[0] if broken else None if len(told) < len(codes) else told[0]


def _mean(values: Sequence[float], tokens: Sequence[float]) -> float:
    """Weighted by tokens; what has none is not asked."""
    return math.fsum(v * n for v, n in zip(values, tokens) if n) / max(sum(tokens), 1)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that FSDP2 cut up (sharing its memory), or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
