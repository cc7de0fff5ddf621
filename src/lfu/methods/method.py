"""What a fine-tuning method is: a name, a source, knobs, and the places where it acts on a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lfu.methods.knobs import knob as knob  # every method's file needs both
from lfu.methods.registry import register

if TYPE_CHECKING:  # `lfu methods` lists what there is without waiting for torch
    import torch
    from datasets import Dataset
    from peft import PeftConfig

    from lfu.methods.run import Batch, Micro, Preparation, Trainer

# Where a method can act -> what that means. Only penalties add up; every other place has room for one method.
PLACES = {
    "answers": "it decides which answers are trained on",
    "mixture": "it decides which rows are mixed in",
    "labels": "it decides which tokens carry the loss",
    "noise": "it disturbs the embeddings",
    "adapter": "it decides how the adapter starts",
    "token loss": "it replaces the loss of a token",
    "penalty": "it adds a term to the loss",
    "step": "it runs a second pass in every step",
    "final weights": "it decides which weights are kept",
}


class Method:
    """Base of all methods; by itself it does nothing.

    A subclass sets the attributes below, declares its knobs (`beta: float = knob(0.7, "...")`), and overrides the
    hooks of the places where it acts, which are called in the order in which they stand here. It is a dataclass
    without being decorated, and if it has a `name` it is registered when it is defined.

    Attributes:
        name: what `method=` and `--method` call it.
        summary: one line for lists.
        source: who proposed it, with the place to read it.
        protects: what it is meant to keep.
        once: what it costs once, before or after training, beside its steps.
        places: keys of `PLACES`.
        never_with: name of another method -> why the two can't be combined, where places alone don't say.
        takes_step: the config's settings of the LfU step (alpha, lam, layers, ...) are this method's.
        whole_weights: it needs whole weights in each process, so FSDP and DeepSpeed are refused.
        keeps_gradients_sound: it keeps what is not finite off theta's gradient itself; else the trainer does.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    protects: ClassVar[str]
    once: ClassVar[str] = ""
    places: ClassVar[tuple[str, ...]] = ()
    never_with: ClassVar[Mapping[str, str]] = {}
    takes_step: ClassVar[bool] = False
    whole_weights = False
    keeps_gradients_sound = False

    if TYPE_CHECKING:

        def __init__(self, **knobs: Any) -> None: ...

    def __init_subclass__(cls) -> None:
        dataclass(cls)
        if "name" in vars(cls):
            register(cls)

    def configure(self, args: Any) -> None:
        """When the config is made: sets what the method stands for. Called again for a copy, so idempotent.

        Raises ValueError: a setting that the method cannot work with.
        """

    def check(self, args: Any) -> None:
        """Once the config is settled. Raises ValueError: a setting that the method cannot work with."""
        fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
        if self.whole_weights and (fsdp or args.deepspeed_plugin is not None):
            raise ValueError(
                f"method {self.name!r} reads whole weights, and FSDP and DeepSpeed cut them up: use DDP or one GPU"
            )

    def check_adapter(self, config: PeftConfig | None, *, further: bool = False) -> None:
        """Before the model is loaded. Raises ValueError: the method cannot work with the adapter of this `config`.

        None: all weights are trained. `further`: the adapter is that of the model, and trained further.
        """

    def rows(self, rows: Dataset, run: Preparation) -> Dataset:
        """Before tokenising: the training rows, in one of TRL's shapes, to use in place of `rows`."""
        return rows

    def adapter(self, config: PeftConfig | None, run: Preparation) -> PeftConfig | None:
        """Before PEFT wraps the model: its config in place of `config` (None: all weights are trained)."""
        return config

    def setup(self, trainer: Trainer) -> None:
        """Model (wrapped), data and accelerator are ready, and nothing has been trained: snapshots, checks."""

    def training_step(self, trainer: Trainer, micro: Micro) -> torch.Tensor:
        """Each micro-batch: leaves its gradient on theta, and returns its loss as `micro.run` does."""
        return micro.run()

    def layers(self, depth: int) -> list[int]:
        """Which layers' hidden states, of 1..depth, `loss` reads: `[depth]` for the logits."""
        return []

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Each micro-batch: its loss in place of TRL's, a scalar in the graph, a sum over `batch.items`."""
        return loss

    def before_update(self, trainer: Trainer) -> None:
        """Before each optimizer step: the gradients are complete, reduced and clipped."""

    def after_update(self, trainer: Trainer) -> None:
        """After each optimizer step; `trainer.state.global_step` counts it."""

    def finish(self, trainer: Trainer) -> None:
        """After training, but not after a killed run: theta may be replaced by what shall be kept."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, as tensors; saved beside each checkpoint."""
        return {}

    @property
    def misses_its_state(self) -> bool:
        """Whether a run that goes on without the saved state is another run, and the user is told."""
        return bool(self.state_dict())

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state_dict` gave."""
