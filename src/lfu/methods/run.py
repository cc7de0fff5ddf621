"""What a method sees of a run: the trainer, the model before there is one, and a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from lfu.methods.tokens import in_pieces
from lfu.model.precision import wide
from lfu.support.annotations import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lfu.methods.untouched import Untouched
    from lfu.model.anatomy import Anatomy
    from lfu.parallel.one import OneProcess
    from lfu.step.record import Record
    from lfu.step.step import LfUStep
    from lfu.undesirable import Auxiliary


class Trainer(Protocol):
    """All that methods know of the trainer: what transformers and TRL have, and below it what `LfUTrainer` adds."""

    args: Any  # the config
    model: Any  # as it is trained: PEFT's wrapper, or the bare model
    accelerator: Any
    optimizer: Any
    processing_class: Any
    state: Any  # global_step updates of max_steps are done
    train_dataset: Any
    eval_dataset: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    maybe_activation_offload_context: Any
    _train_batch_size: int  # which auto_find_batch_size changes

    def add_callback(self, callback: Any) -> None: ...
    def compute_loss_context_manager(self) -> Any: ...
    def evaluation_loop(self, dataloader: Any, description: str, **more: Any) -> Any: ...
    def get_eval_dataloader(self) -> Any: ...
    def is_world_process_zero(self) -> bool: ...
    def log(self, logs: dict[str, float]) -> None: ...

    step: LfUStep | None  # of a method that takes an LfU step
    last_record: Record | None  # of LfU's newest micro-batch

    @property
    def anatomy(self) -> Anatomy: ...  # the parts of the model
    @property
    def untouched(self) -> Untouched: ...  # the model as it was before training; first asked for in `setup`
    @property
    def starts_update(self) -> bool: ...  # whether the current micro-batch is the first of its update
    def say(self, line: str) -> None: ...  # tells the user one line
    def log_metric(self, name: str, value: float) -> None: ...  # of this micro-batch; the log shows the mean of several
    def unmetered(self) -> AbstractContextManager[None]: ...  # passes inside it leave no trace in the metrics
    def batch_of(self, rows: list[dict[str, Any]]) -> dict[str, Any]: ...  # collated, of tokenised rows
    def extra_loss(self, model: Any, batch: Any, num_items: Any) -> torch.Tensor: ...  # for a pass of the method's own
    def share_of_loss(self, record: Record, items: float, processes: int) -> torch.Tensor: ...  # what a step returns
    def figures_of(self, record: Record, items: float, processes: int, layers: bool) -> dict[str, float]: ...  # to log
    def make_auxiliary(self) -> Auxiliary: ...  # what LfU's ascent moves

    def guarded(self, run: Callable[[], torch.Tensor], processes: OneProcess) -> torch.Tensor:
        """A forward and backward that leave zero gradients where the loss is not finite."""


@dataclass
class Preparation:
    """What a method may look at before the trainer exists.

    Attributes:
        model: as it will be fine-tuned, before PEFT wraps it; untouched so far.
        tokenizer: or the processor.
        args: the config.
        say: tells the user one line.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    args: Any
    say: Callable[[str], None]

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer itself, which a processor holds."""
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)


@dataclass
class Micro:
    """One micro-batch as `Method.training_step` sees it.

    Attributes:
        model: as the trainer calls it.
        inputs: `input_ids`, `labels` `(B, T)` and what else the model takes, on the device.
        items: what SFTTrainer's gradient of this micro-batch is divided by, in tokens.
        tokens: its own labelled tokens; `loss * items / tokens` is its mean loss.
        index: its number in the run.
        run: forward and backward with SFTTrainer's loss and the terms of the other methods. Adds to `.grad` and
            returns the loss, detached and scaled as `training_step` returns it.
    """

    model: nn.Module
    inputs: dict[str, Any]
    items: float
    tokens: int
    index: int
    run: Callable[[], torch.Tensor]


@dataclass
class Batch:
    """One micro-batch as `Method.loss` sees it, after the model's forward.

    Attributes:
        inputs: `input_ids`, `labels` `(B, T)` and what else the model takes.
        positions: `(N,)`, flat indices of the N positions that predict a labelled token.
        hidden: layer (1..K, K after the final norm) -> `(N, d)` at `positions`, in the graph; the layers that the
            method asked for by `Method.layers`.
        items: what sums over tokens are divided by: the labelled tokens of all micro-batches of the update.
        share: what a term that counts once per update, not per token, is multiplied by.
        trainer: `trainer.anatomy` knows the model's parts.
    """

    inputs: Mapping[str, Any]
    positions: torch.Tensor
    hidden: dict[int, torch.Tensor]
    items: float
    share: float
    trainer: Trainer

    @property
    def targets(self) -> torch.Tensor:
        """`(N,)`: the labelled tokens."""
        labels = self.inputs["labels"][:, 1:].flatten()
        return labels[labels != -100]

    @property
    def last(self) -> torch.Tensor:
        """`(N, d)`: what the head reads."""
        return self.hidden[max(self.hidden)]

    def per_token(self, function: Callable[..., torch.Tensor], *more: torch.Tensor) -> torch.Tensor:
        """`function(logits, targets, *more)` of all N labelled tokens: `(N,)`, in the graph.

        TRL's fused head keeps no logits, and those of all tokens might not fit into memory. So they are made here, in
        float32 or wider, for some of the tokens at a time, and once more in the backward: `function` gets `(n, V)`,
        `(n,)` targets on their device and the same pieces of `more`, each `(N, ...)`, and returns `(n,)`; n may be 0.
        """

        def piece(hidden: torch.Tensor, targets: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            logits = wide(self.trainer.anatomy.logits(hidden))
            return function(logits, targets.to(logits.device), *rest)

        return in_pieces(piece, self.last, self.targets, *more)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` `(N,)` over `items`: this micro-batch's part of their mean over the update."""
        return values.sum() / self.items

    def log_mean(self, name: str, value: torch.Tensor) -> None:
        """Logs `value`, a sum over `items`, as the mean over this micro-batch's own labelled tokens."""
        self.trainer.log_metric(name, float(value.detach()) * self.items / max(len(self.positions), 1))
