"""`LfUTrainer`: TRL's `SFTTrainer` with a fine-tuning method in it. Thin: what a method does is in lfu/methods."""

from __future__ import annotations

import copy
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, TrainerCallback, set_seed
from trl import SFTTrainer
from trl.trainer.utils import create_model_from_path

from lfu.config import LfUConfig
from lfu.data.learned import LearnsWhatRowsSay
from lfu.methods import check_adapter, methods_of
from lfu.methods.identity import identity
from lfu.methods.method import Method
from lfu.methods.run import Batch, Micro, Preparation
from lfu.methods.untouched import Untouched
from lfu.model.anatomy import Anatomy, anatomy
from lfu.model.representations import Reader, answer_positions
from lfu.model.tensors import global_norm
from lfu.support.files import remove_unfinished
from lfu.support.versions import mend_trl
from lfu.support.words import tell
from lfu.training.advice import LfUAdvice
from lfu.training.micro_batches import CountsMicroBatches
from lfu.training.model_card import add_to_card, name_the_base, of_kept
from lfu.training.resuming import Resumes, newest_checkpoint
from lfu.training.saving import refuse_two_wrappers
from lfu.undesirable import Auxiliary

if TYPE_CHECKING:
    from lfu.parallel.one import OneProcess
    from lfu.step.record import Record
    from lfu.step.step import LfUStep
    from lfu.support.annotations import Model

mend_trl()


class LfUTrainer(LearnsWhatRowsSay, Resumes, CountsMicroBatches):
    """`SFTTrainer` with Learning from the Undesirable, or any other method. Same arguments, data sets, checkpoints.

    `args.method` says which; with `method="sft"` or `lam=0` every step is SFTTrainer's own.

    Under LfU the logged `loss` is Eq. 6's total; beside it come `lfu/sft_loss`, `lfu/consistency`,
    `lfu/gradient_ratio`, `lfu/gradient_cosine`, `lfu/displacement` (mean over layers), `lfu/ascent_grad_norm`,
    `lfu/lam`, `lfu/alpha` and `lfu/skipped` (share of micro-batches). `last_record` holds the newest `Record` with the
    figures per layer. `notes` holds what the methods told about their work.

    Args: those of `trl.SFTTrainer`; `args` is an `LfUConfig`. `tell` is called with each line about rows that are cut
    off, left out or learned in another way than they say; by default these lines are printed and kept in `notes`.

    Raises:
        TypeError: `args` is another config.
        ValueError: a setting that a method cannot work with; the message says which and why.
    """

    _tag_names = ["trl", "sft", "lfu"]  # noqa: RUF012 (TRL's own way to name a trainer)
    _name = "LfU"
    _paper = {  # noqa: RUF012
        "title": "Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting",
        "id": "2511.13052",
    }
    # of a method that takes an LfU step: its step, and what the newest micro-batch showed
    step: LfUStep | None = None
    last_record: Record | None = None
    # set by whoever stops a run before its end: the methods then leave the weights as they are
    interrupted: bool = False

    def __init__(
        self, model: str | Model, args: LfUConfig | None = None, *positional: Any,
        tell: Callable[[str], None] | None = None, **named: Any,
    ) -> None:  # fmt: skip
        if args is None:
            args = LfUConfig("lfu-output")
        if not isinstance(args, LfUConfig):
            raise TypeError(
                f"args must be an LfUConfig, got {type(args).__name__}: LfUConfig takes SFTConfig's fields too"
            )
        self.methods = methods_of(args.method, args.method_args)
        if not any(method.takes_step for method in self.methods):  # the model card says what it was trained with
            self._tag_names, self._name, self._paper = ["trl", "sft"], "SFT", {}
        self.notes: list[str] = []
        self.tell = cache(tell or self.say)  # what is odd in both sets of rows is said once
        self._bad_loss: torch.Tensor | None = None
        self._guard: OneProcess | None = None
        if isinstance(model, str):
            args.model_init_kwargs = {"use_safetensors": True} | dict(args.model_init_kwargs or {})
        given = inspect.signature(SFTTrainer.__init__).bind(self, model, args, *positional, **named)
        start, adapter = given.arguments["model"], given.arguments.get("peft_config")
        further = isinstance(start, PeftModel)
        check_adapter(self.methods, start.active_peft_config if further else adapter, further=further)
        self._prepare(given.arguments)
        super().__init__(*given.args[1:], **given.kwargs)
        refuse_two_wrappers(self.model)
        for method in self.methods:
            method.setup(self)
        self.add_callback(_RoundUpdates(self))

    # -- before TRL sets up --------------------------------------------------------------------------------------------

    def _prepare(self, given: dict[str, Any]) -> None:
        """Lets the methods change training rows and adapter. Without such a method nothing is touched."""
        acting = [m for m in self.methods if _overrides(m, "rows") or _overrides(m, "adapter")]
        if not acting:
            return
        args: LfUConfig = given["args"]
        _load_as_sft_trainer_does(given)
        run = Preparation(given["model"], given["processing_class"], args, self.say)
        for method in acting:
            if _overrides(method, "rows"):
                if given.get("formatting_func") is not None:
                    raise ValueError(f"method {method.name!r} reads the rows before formatting_func: format them first")
                if not isinstance(given.get("train_dataset"), Dataset):
                    raise ValueError(f"method {method.name!r} reads all training rows first: give a datasets.Dataset")
                given["train_dataset"] = method.rows(given["train_dataset"], run)
            given["peft_config"] = method.adapter(given.get("peft_config"), run)

    def say(self, line: str) -> None:
        """Tells the user one line about a method's work, once, and keeps it in `notes`."""
        self.notes.append(line)
        if int(os.environ.get("RANK", "0")) == 0:
            tell(f"lfu: {line}")

    def make_auxiliary(self) -> Auxiliary:
        """What LfU's ascent moves, as `args` say; override it to train with an auxiliary of your own."""
        return self.args.make("auxiliary")

    @cached_property
    def anatomy(self) -> Anatomy:
        """The parts of the model."""
        return anatomy(self.model, self.args.blocks)

    @cached_property
    def untouched(self) -> Untouched:
        """The model as it is when first asked for, which is before training; one copy for all methods that need it."""
        return Untouched(self.model, self.anatomy)

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch: SFTTrainer's step with what the method puts round it."""
        around = [method for method in self.methods if _overrides(method, "training_step")]
        if not around:
            return super().training_step(model, inputs, num_items_in_batch)
        for each in (model, self.optimizer):  # as Trainer does, but before the method's first pass
            if callable(getattr(each, "train", None)):
                each.train()
        inputs = self._prepare_inputs(inputs)
        run = lambda: super(LfUTrainer, self).training_step(model, dict(inputs), num_items_in_batch)
        tokens = len(answer_positions(inputs["labels"]))
        items = self.items_of(tokens, num_items_in_batch)
        micro = Micro(model, inputs, items, tokens, self.next_micro_batch(), run)
        return around[0].training_step(self, micro)  # places are exclusive: only one method surrounds a step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """SFTTrainer's loss; while training, as the methods change it.

        While `guarded`, a non-finite loss becomes a zero that leaves zero gradients, and is remembered.
        """
        if not self.model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        result = self._training_loss(model, inputs, num_items_in_batch)
        if self._guard is None or self._guard.finite(result):  # in all processes, or in none
            return result
        self._bad_loss = torch.full_like(result.detach(), torch.nan)
        return self._guard.nothing(inputs, self.anatomy.theta())

    def _training_loss(self, model: Any, inputs: Any, num_items: Any) -> torch.Tensor:
        terms = [method for method in self.methods if _overrides(method, "loss")]
        if not terms:
            return super().compute_loss(model, inputs, num_items_in_batch=num_items)
        depth = len(self.anatomy.blocks)
        layers = sorted({layer for method in terms for layer in method.layers(depth)})
        where = answer_positions(inputs["labels"])
        with Reader(self.anatomy, layers).reading(where, detach=False) as hidden:
            # a copy: for a loss function of its own, or of TRL 0.24's dft, Trainer takes the labels out
            loss = super().compute_loss(model, dict(inputs), num_items_in_batch=num_items)
        counted = self.counted(num_items)
        items = float(len(where) if counted is None else counted) / self.averaged(counted)
        # a loss that is a mean over the micro-batch Trainer divides by the accumulation steps itself
        share = 1.0 if counted is None else 1.0 / self.current_gradient_accumulation_steps
        batch = Batch(inputs, where, hidden, max(items, 1.0), share, self)
        for method in terms:
            loss = method.loss(loss, batch)
        return loss

    def extra_loss(self, model: Any, batch: Any, num_items: Any) -> torch.Tensor:
        """The training loss for a method's own passes, `num_items` as `Micro.items`: leaves no trace in the metrics."""
        count = torch.tensor(round(float(num_items) * self.averaged(num_items)), device=self.args.device)
        with self.unmetered():
            loss = self._training_loss(model, dict(batch), count)
        return loss if self.counted(count) is not None else loss / self.current_gradient_accumulation_steps

    def batch_of(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch that the collator makes of tokenised training rows, on the device."""
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        return self._prepare_inputs(collate(rows))

    def guarded(self, run: Callable[[], torch.Tensor], processes: OneProcess) -> torch.Tensor:
        """`run`, a forward and backward; a non-finite loss leaves zero gradients and is what is returned."""
        self._guard, self._bad_loss = processes, None
        try:
            loss = run()
        finally:
            self._guard = None
        return loss if self._bad_loss is None else self._bad_loss

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **named: Any) -> Any:
        """SFTTrainer's; then the methods have the last word on the weights, unless the run was `interrupted`.

        `resume_from_checkpoint=True` takes the newest checkpoint that is complete and can be read.

        Raises:
            CheckpointError: there is none, or it does not fit model and settings.
        """
        if self.args.should_save:
            remove_unfinished(Path(self.args.output_dir))
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(
                self.args, lambda line: warnings.warn(line, LfUAdvice, stacklevel=4)
            )
        try:
            output = super().train(resume_from_checkpoint, *positional, **named)
        except BaseException:
            if handle := getattr(self, "neftune_hook_handle", None):
                handle.remove()  # Trainer takes it off at the end of a good run only
            raise
        if not self.interrupted:
            self.finish()
        return output

    @property
    def finishes(self) -> bool:
        """Whether a method changes the weights once training is over."""
        return any(_overrides(method, "finish") for method in self.methods)

    # -- what is logged and saved --------------------------------------------------------------------------------------

    def log_metric(self, name: str, value: float) -> None:
        """A figure of this micro-batch; SFTTrainer averages it over the logging interval."""
        self._metrics["train"][name].append(value)

    @contextmanager
    def unmetered(self) -> Iterator[None]:
        """Passes made inside leave the metrics and the count of tokens as they were."""
        metrics: Any = copy.deepcopy(self._metrics)  # type: ignore[has-type]
        tokens: int = self._total_train_tokens  # type: ignore[has-type]
        try:
            yield
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens

    def identity(self) -> dict[str, Any]:
        """The methods with their knobs, this package's settings, and the training rows, as checkpoints keep them."""
        return identity(self.methods, self.args, self.train_dataset)

    def complete_card(self, card: Path, folder: Path) -> None:
        """What was gained and forgotten so far, and of which model, on the model card."""
        history, over = self.state.log_history, not self.is_in_train
        if over and self.finishes and not self.interrupted:  # no step had the weights that a method then made
            history = of_kept(history, -1)
        elif over and self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            history = of_kept(history, self.state.best_global_step)  # the weights of that step are back
        add_to_card(card, history, self.args.method)
        name_the_base(card, str(getattr(self.model.config, "_name_or_path", "")), folder.name)


def _load_as_sft_trainer_does(given: dict[str, Any]) -> None:
    """A model that is given by name, and the tokenizer of one that is given without."""
    args, revision = given["args"], None
    if isinstance(given["model"], str):
        set_seed(args.seed)
        options = {"trust_remote_code": args.trust_remote_code} | dict(args.model_init_kwargs or {})
        if given.get("quantization_config") is not None:
            options["quantization_config"] = given.pop("quantization_config")
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        given["model"] = create_model_from_path(given["model"], **options)
        args.model_init_kwargs, revision = None, options.get("revision")
    if given.get("processing_class") is None:
        given["processing_class"] = AutoProcessor.from_pretrained(
            given["model"].config._name_or_path, revision=revision, trust_remote_code=args.trust_remote_code
        )


class _RoundUpdates(TrainerCallback):
    """Keeps broken updates from theta, and tells the methods that the optimizer has moved it."""

    def __init__(self, trainer: LfUTrainer):
        self.trainer = trainer
        self.left_out = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._drop_broken(state)
        for method in self.trainer.methods:
            method.before_update(self.trainer)

    def _drop_broken(self, state: Any) -> None:
        """A gradient that is not finite is dropped: the optimizer then leaves theta as it is.

        Some methods look after their own, and fp16's GradScaler does; sharded gradients are left to FSDP and DeepSpeed.
        """
        t = self.trainer
        if any(method.keeps_gradients_sound for method in t.methods):
            return
        if t.accelerator.scaler is not None or t.is_deepspeed_enabled or t.is_fsdp_enabled:
            return
        theta = [p for p in t.model.parameters() if p.grad is not None]
        if math.isfinite(global_norm([p.grad for p in theta])):
            return
        for p in theta:
            p.grad = None
        self.left_out += 1
        if self.left_out == 1:
            warnings.warn(
                f"the gradient of update {state.global_step + 1} is not finite: it is left out, and so are others like "
                "it. Look for a loss that is not finite, or lower the learning rate",
                LfUAdvice,
                stacklevel=3,
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.trainer._micro = (-1, 0)  # `auto_find_batch_size` begins again, at update 0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for method in self.trainer.methods:
            method.after_update(self.trainer)


def _overrides(method: Method, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(Method, hook)
