"""What a fine-tuning method is: a name, a source, knobs, and the places where it acts on a run.

A method is a dataclass; its fields are its knobs, with the source's defaults. It overrides the hooks of the places
where it acts and leaves the rest. The trainer calls, in this order:

    configure(args)            when the config is made: settings of TRL's that the method stands for
    check(args)                once the config is settled: what the method cannot work with
    rows(rows, run)            before tokenising: other or more training rows
    adapter(config, run)       before PEFT wraps the model: another initialisation
    setup(trainer)             once model and data are ready: snapshots, checks
    training_step(trainer, micro) each micro-batch: what surrounds forward and backward
    loss(loss, batch)          each micro-batch: another loss, or one more term
    before_update(trainer)     before each optimizer step: gradients are complete and clipped
    after_update(trainer)      after each optimizer step
    finish(trainer)            after training: the weights that are kept
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lfu.methods.registry import register

if TYPE_CHECKING:  # `lfu methods` lists what there is without waiting for torch
    import torch
    from datasets import Dataset
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

    from lfu.model.anatomy import Anatomy
    from lfu.support.annotations import Tokenizer

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


class Trainer(Protocol):
    """What methods may know of the trainer: TRL's `SFTTrainer` and these. They import no trainer."""

    args: Any
    model: Any
    accelerator: Any
    train_dataset: Any
    eval_dataset: Any
    state: Any
    starts_update: bool
    anatomy: Anatomy

    def say(self, line: str) -> None: ...
    def log_metric(self, name: str, value: float) -> None: ...
    def add_callback(self, callback: Any) -> None: ...
    def unmetered(self) -> AbstractContextManager[None]: ...
    def extra_loss(self, model: Any, batch: Any, num_items: Any) -> torch.Tensor: ...


@dataclass
class Preparation:
    """What a method may look at before the trainer exists.

    Attributes:
        model: the model as it will be fine-tuned, before PEFT wraps it; untouched so far.
        tokenizer: its tokenizer.
        args: the config.
        say: tells the user one line.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    args: Any
    say: Callable[[str], None]


@dataclass
class Micro:
    """One micro-batch as `Method.training_step` sees it.

    Attributes:
        model: the model as the trainer calls it.
        inputs: `input_ids`, `labels` `(B, T)` and what else the model takes, on the device.
        num_items: labelled tokens of all micro-batches of the update, as the trainer counts them; may be None.
        items: what SFTTrainer's gradient of this micro-batch is divided by, in tokens.
        tokens: its own labelled tokens; `loss * items / tokens` is its mean loss.
        index: its number in the run.
        run: forward and backward with SFTTrainer's loss and the terms of the other methods; adds to `.grad` and
            returns the loss, detached and scaled as `training_step` returns it.
    """

    model: nn.Module
    inputs: dict[str, Any]
    num_items: torch.Tensor | int | None
    items: float
    tokens: int
    index: int
    run: Callable[[], torch.Tensor]


class Batch:
    """One micro-batch as `Method.loss` sees it, after the model's forward.

    Attributes:
        inputs: `input_ids`, `labels` `(B, T)` and what else the model takes.
        positions: `(N,)`, flat indices of the N positions that predict a labelled token.
        hidden: layer (1..K) -> `(N, d)` at `positions`, still in the graph; those
            that the method asked for in `Method.layers`. Layer K is after the final norm.
        targets: `(N,)`, the labelled tokens.
        items: what token sums are divided by: the labelled tokens of all micro-batches of the update.
        share: what a term that counts once an update, not per token, is multiplied by.
        trainer: the trainer; `trainer.anatomy` knows the model's parts.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        positions: torch.Tensor,
        hidden: dict[int, torch.Tensor],
        items: float,
        share: float,
        trainer: Trainer,
    ):
        self.inputs, self.positions, self.hidden = inputs, positions, hidden
        self.items, self.share, self.trainer = items, share, trainer
        labels = inputs["labels"][:, 1:].flatten()
        self.targets = labels[labels != -100]

    def log_mean(self, name: str, value: torch.Tensor) -> None:
        """Logs `value`, a sum over `items`, as the mean over this micro-batch's own labelled tokens."""
        self.trainer.log_metric(name, float(value.detach()) * self.items / max(len(self.positions), 1))

    @property
    def last(self) -> torch.Tensor:
        """`(N, d)`: what the head reads."""
        return self.hidden[max(self.hidden)]


@dataclass
class Method:
    """Base of all methods; itself it does nothing.

    A subclass that has a `name` is registered when it is defined.

    Class attributes:
        name: what `method=` and `--method` call it.
        summary: one line for lists.
        source: who proposed it, with the place to read it.
        protects: what it is meant to keep.
        once: what it costs once, before or after training, beside its steps.
        places: keys of `PLACES`.
        never_with: name of another method -> why the two can't be combined, where places alone don't say.
        takes_step: the config's settings of the LfU step (alpha, lam, layers, ...) are this method's.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    protects: ClassVar[str]
    once: ClassVar[str] = ""
    places: ClassVar[tuple[str, ...]] = ()
    never_with: ClassVar[Mapping[str, str]] = {}
    takes_step: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            register(cls)

    def layers(self, depth: int) -> list[int]:
        """Which layers' hidden states (1..depth) `loss` wants to read. None by default."""
        return []

    def configure(self, args: Any) -> None:
        """Sets what the method stands for in the config. Called again when a config is copied: idempotent.

        Raises:
            ValueError: a setting that the method cannot work with.
        """

    def check(self, args: Any) -> None:
        """The config is whole now.

        Raises:
            ValueError: a setting that the method cannot work with.
        """

    def rows(self, rows: Dataset, run: Preparation) -> Dataset:
        """The training rows to use in place of `rows`, a `datasets.Dataset` in one of TRL's shapes."""
        return rows

    def adapter(self, config: PeftConfig | None, run: Preparation) -> PeftConfig | None:
        """The PEFT config to use in place of `config` (None: full fine-tuning)."""
        return config

    def setup(self, trainer: Trainer) -> None:
        """Model (wrapped), data and accelerator are ready; nothing has been trained."""

    def training_step(self, trainer: Trainer, micro: Micro) -> torch.Tensor:
        """One micro-batch: leaves its gradient on theta, returns its loss as `micro.run` does."""
        return micro.run()

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The training loss of a micro-batch, given TRL's: a scalar in the graph, a sum over `batch.items`."""
        return loss

    def before_update(self, trainer: Trainer) -> None:
        """An update's gradients are complete, reduced and clipped; `trainer.state.global_step` updates are done."""

    def after_update(self, trainer: Trainer) -> None:
        """The optimizer has just moved theta; `trainer.state.global_step` counts this update."""

    def finish(self, trainer: Trainer) -> None:
        """Training is over; theta may be replaced by what shall be kept. Called once, not in a killed run."""

    @property
    def keeps_gradients_sound(self) -> bool:
        """Whether the method itself keeps what is not finite off theta's gradient; else the trainer does."""
        return False

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs, as tensors; saved beside each checkpoint."""
        return {}

    @property
    def misses_its_state(self) -> bool:
        """Whether a run that goes on without the saved state is another run, and the user is told."""
        return bool(self.state_dict())

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state_dict` gave."""


def knob(default: Any, help: str, *, low: float | None = None, above: float | None = None, high: float | None = None,
         choices: tuple[str, ...] | None = None, output: bool = False) -> Any:  # fmt: skip
    """A method's dataclass field: its default, a line of help, its range (`low` inclusive, `above` exclusive).

    `output`: it names a place where the method writes; what lies there decides no result.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices}
    return field(default=default, metadata={"help": help, "limits": limits, "output": output})


def knobs_of(method: type[Method] | Method) -> list[dataclasses.Field]:
    """The knobs of a method: dataclass fields made by `knob`."""
    return [f for f in dataclasses.fields(method) if "limits" in f.metadata]


def checked_knob(owner: str, f: dataclasses.Field, value: Any) -> Any:
    """`value` (often a string from the command line) as the knob's type, within its range.

    Raises:
        ValueError: it is not; the message names knob, range and value.
    """
    kind = type(f.default) if f.default is not None else str
    limits = f.metadata["limits"]
    label = f"{owner}.{f.name}"
    if limits["choices"]:
        if value not in limits["choices"]:
            raise ValueError(f"{label} must be one of {', '.join(limits['choices'])}, got {value!r}")
        return value
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in words:
            raise ValueError(f"{label} must be true or false, got {value!r}")
        return words[str(value).lower()]
    if kind not in (int, float):
        return value if value is None else str(value)
    return _number(label, kind, value, limits)


def _number(label: str, kind: type, value: Any, limits: Mapping[str, Any]) -> float | int:
    low, above, high = limits["low"], limits["above"], limits["high"]
    bounds = [f">= {low:g}"] if low is not None else [f"> {above:g}"] if above is not None else []
    bounds += [f"<= {high:g}"] if high is not None else []
    wanted = " ".join(["a whole number" if kind is int else "a finite number", " and ".join(bounds)]).strip()
    try:
        number = kind(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    inside = (
        math.isfinite(number)
        and (kind is float or float(value) == number)
        and (low is None or number >= low)
        and (above is None or number > above)
        and (high is None or number <= high)
    )
    if not inside:
        raise ValueError(f"{label} must be {wanted}, got {value!r}")
    return number
