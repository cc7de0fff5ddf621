"""Learning from the Undesirable in any subclass of transformers' `Trainer` that trains on labels."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from lfu.methods.lfu import refuse_settings
from lfu.model.representations import answer_positions
from lfu.parallel.refusals import refuse_data_parallel
from lfu.step.record import Record
from lfu.step.settings import StepSettings
from lfu.step.step import LfUStep
from lfu.support.errors import did_you_mean
from lfu.training.checkpoints import STATE_FILE
from lfu.training.micro_batches import CountsMicroBatches

T = TypeVar("T", bound=Trainer)


def with_lfu(trainer: type[T], **settings: Any) -> type[T]:
    """A subclass of `trainer` that takes LfU steps: `with_lfu(Trainer, lam="auto")(model=model, args=args, ...)`.

    It logs what `LfUTrainer` logs (`lfu/consistency`, `lfu/gradient_ratio`, ...), and checkpoints hold the step's
    state. The newest `Record` is `last_record`. One process or DDP or FSDP2; the data must have `labels`.

    `trainer` is `transformers.Trainer` or a subclass whose `compute_loss` is a mean over the labelled tokens; the
    `settings` are those of `LfUStep`, with `lam="auto"` unless it is given.

    Raises ValueError: an unknown setting; when the trainer is made: arguments that LfU can't work with.
    """
    check_settings(settings)
    body = {"lfu_settings": {"lam": "auto"} | settings, "__doc__": _TakesLfUSteps.__doc__}
    return type(f"LfU{trainer.__name__}", (_TakesLfUSteps, trainer), body)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that `LfUStep` doesn't have, or that the trainer looks after."""
    known = ["auxiliary", "consistency", *(f.name for f in fields(StepSettings) if f.name != "ascent_batch")]
    for name in settings:
        if name not in known:
            raise ValueError(f"lfu has no setting {name!r}; it has {', '.join(known)}.{did_you_mean(name, known)}")


class _TakesLfUSteps(CountsMicroBatches):
    """Learning from the Undesirable in the trainer whose class comes after this one."""

    lfu_settings: dict[str, Any]
    last_record: Record | None = None

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        refuse_settings(self.args)
        refuse_data_parallel(self.args, "LfU")
        self.lfu_step: LfUStep | None = None
        self._lfu_state: dict[str, torch.Tensor] = {}  # of a checkpoint, until there is a step
        self._lfu_logs: dict[str, list[float]] = defaultdict(list)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch; returns its part of LfU's loss, detached and scaled as `Trainer` scales its own."""
        model.train()
        step = self._made(model)
        inputs = self._prepare_inputs(inputs)
        if not isinstance(inputs.get("labels"), torch.Tensor):
            raise ValueError(
                f"the batches of {type(self).__name__.removeprefix('LfU')} have no 'labels' (B, T), but "
                f"{', '.join(inputs)}: LfU needs the loss over labelled tokens, as in supervised fine-tuning"
            )
        items = self.items_of(len(answer_positions(inputs["labels"])), num_items_in_batch)
        record = step(inputs, num_items=items, index=self.next_micro_batch(), update=self.state.global_step)
        self.last_record = record
        for name, value in self.figures_of(record, items, step.processes.size).items():
            self._lfu_logs[f"lfu/{name}"].append(value)
        return self.share_of_loss(record, items, step.processes.size)

    def _made(self, model: nn.Module) -> LfUStep:
        if self.lfu_step is None:  # only now is the model in its wrapper
            self.lfu_step = LfUStep(
                model,
                **{"seed": self.args.seed} | self.lfu_settings,
                loss_fn=self._lfu_loss,
                backward=self.accelerator.backward,
                autocast=self.accelerator.autocast,
                grad_scaler=self.accelerator.scaler,
            )
            if self._lfu_state:
                self.lfu_step.load_state_dict(self._lfu_state)
        return self.lfu_step

    def _lfu_loss(self, model: nn.Module, batch: Any, items: float | torch.Tensor) -> torch.Tensor:
        """The trainer's own loss, summed over the labelled tokens and divided by `items`."""
        if self.counted(items) is not None:
            return self.compute_loss(model, dict(batch), num_items_in_batch=items * self.averaged(items))
        return self.compute_loss(model, dict(batch)) * (len(answer_positions(batch["labels"])) / items)

    def log(self, logs: dict[str, float], *positional: Any, **named: Any) -> None:
        """The trainer's own; LfU's figures, averaged since the last time, stand beside the loss."""
        if "loss" in logs:
            logs = logs | {name: fmean(values) for name, values in self._lfu_logs.items()}
            self._lfu_logs.clear()
        super().log(logs, *positional, **named)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.lfu_step is not None and self.args.should_save:
            save_file(self.lfu_step.state_dict(), Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / STATE_FILE).exists():
            self._lfu_state, self.lfu_step = load_file(path), None
