"""`LfUTrainer`: TRL's `SFTTrainer` whose training step is LfU's. The algorithm is in objective.py, not here."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from trl import SFTTrainer

from lfu.advice import Advice, LfUAdvice
from lfu.config import LfUConfig
from lfu.consistency import consistency_of
from lfu.objective import LfUStep, Record
from lfu.representations import answer_positions
from lfu.undesirable import Auxiliary, LoRA, Own, Steering

STATE_FILE = "lfu_state.json"


class LfUTrainer(SFTTrainer):
    """`SFTTrainer` with Learning from the Undesirable. Same arguments, same data sets, same checkpoints.

    With `args.lam == 0` (or `method="sft"`) every step is SFTTrainer's own.

    The logged `loss` is Eq. 6's total; beside it come `lfu/sft_loss`, `lfu/consistency`, `lfu/gradient_ratio`,
    `lfu/gradient_cosine`, `lfu/displacement` (mean over layers), `lfu/ascent_grad_norm`, `lfu/lam` and `lfu/skipped`
    (share of micro-batches). `last_record` holds the newest `Record` with the figures per layer.

    Args: those of `trl.SFTTrainer`; `args` is an `LfUConfig`.

    Raises:
        TypeError: `args` is another config.
        ValueError: a setting that LfU cannot work with; the message says which and why.
    """

    _tag_names = ["trl", "sft", "lfu"]  # noqa: RUF012 (TRL's own way to name a trainer)
    _name = "LfU"
    _paper = {  # noqa: RUF012
        "title": "Learning from the Undesirable: Robust Adaptation of Language Models without Forgetting",
        "id": "2511.13052",
    }
    # None with lam=0, and while TRL's __init__ runs
    step: LfUStep | None = None

    def __init__(self, model: Any, args: LfUConfig | None = None, *positional: Any, **named: Any):
        if args is None:
            args = LfUConfig("lfu-output")
        if not isinstance(args, LfUConfig):
            raise TypeError(
                f"args must be an LfUConfig, got {type(args).__name__}: LfUConfig takes SFTConfig's fields too"
            )
        self.last_record: Record | None = None
        self._micro = (-1, 0)  # (update, micro-batch in it)
        self._update_losses: list[float] = []
        self._bad_loss: torch.Tensor | None = None
        self._order: tuple[int, torch.Tensor] | None = None  # (epoch, the independent ascent batches' shuffle)
        if args.lam != 0:
            _refuse_settings(args)
        super().__init__(model, args, *positional, **named)
        if args.lam != 0:
            self._refuse_setup()
            self.step = self._make_step()
            self.advice = Advice(self.args.alpha, self.args.lam)

    # -- construction --------------------------------------------------------------------------------------------------

    def _make_step(self) -> LfUStep:
        args = self.args
        return LfUStep(
            self.model,
            auxiliary=self.make_auxiliary(),
            alpha=args.alpha,
            lam=args.lam,
            consistency=consistency_of(args.consistency, reduction=args.mse_reduction, temperature=args.temperature),
            layers=args.layers,
            final_norm=args.final_norm,
            positions=args.positions,
            direction=args.direction,
            ascent_batch=args.ascent_batch,
            ascent_steps=args.ascent_steps,
            same_dropout=args.same_dropout,
            on_bad_batch=args.on_bad_batch,
            strength=args.strength,
            seed=args.seed,
            loss_fn=self._ascent_loss,
            backward=self.accelerator.backward,
            autocast=self.accelerator.autocast,
            grad_scaler=self.accelerator.scaler,
        )

    def make_auxiliary(self) -> Auxiliary:
        """What the ascent moves, as `args` say; override it to train with an auxiliary of your own."""
        args = self.args
        if args.auxiliary == "steering":
            return Steering(preserve_norm=args.steering_norm)
        if args.auxiliary == "own":
            return Own()
        targets = [t.strip() for t in args.aux_targets.split(",") if t.strip()] if args.aux_targets else None
        return LoRA(rank=args.aux_rank, scaling=args.aux_scaling, targets=targets)

    def _refuse_setup(self) -> None:
        """What shows only once TRL has set model and data up."""
        if self.accelerator.num_processes > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "LfU runs in one process in this version: under DDP, FSDP or DeepSpeed the second backward would go "
                "round their gradient reduction. Use one device, or lam=0."
            )
        peft_config = getattr(self.model, "active_peft_config", None)
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(peft_config).__name__} puts virtual tokens before the prompt, so token positions do not match "
                "the labels': use LoRA, DoRA or full fine-tuning with LfU"
            )
        if getattr(self, "_is_vision_dataset", False):
            raise ValueError("LfU compares text layers: vision-language data sets are not supported")
        if self.args.ascent_batch == "independent" and isinstance(self.train_dataset, IterableDataset):
            raise ValueError("ascent_batch='independent' draws rows by number: a streamed data set has none")

    # -- training ------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-batch; returns its part of Eq. 6 (detached), scaled as SFTTrainer scales its loss."""
        if self.step is None:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        items = self._items(inputs, num_items_in_batch)
        index = self._micro_index()
        independent = self.args.ascent_batch == "independent"
        record = self.step(
            inputs,
            ascent_batch=self._independent_batch(index) if independent else None,
            num_items=items,
            first_pass=lambda: self._first_pass(model, inputs, num_items_in_batch),
            index=index,
        )
        self._note(record)
        return torch.tensor(record.loss * record.tokens / items, device=self.args.device)

    def _first_pass(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """SFTTrainer's own step: forward, backward, its metrics."""
        self._bad_loss = None
        loss = super().training_step(model, dict(inputs), num_items)
        return loss if self._bad_loss is None else self._bad_loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """SFTTrainer's; a non-finite training loss becomes a zero that leaves zero gradients, and is remembered."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.step is None or not model.training or return_outputs or torch.isfinite(result):
            return result
        self._bad_loss = result.detach()
        return torch.stack([p.flatten()[:0].sum().float() for p in self.step.anatomy.theta()]).sum()

    def _ascent_loss(self, model: Any, batch: Any, num_items: Any) -> torch.Tensor:
        """Eq. 1 as this trainer computes it, for the ascent's own passes: leaves no trace in the metrics."""
        metrics: Any = copy.deepcopy(self._metrics)  # type: ignore[has-type]
        tokens: int = self._total_train_tokens  # type: ignore[has-type]
        try:
            return super().compute_loss(model, dict(batch), num_items_in_batch=num_items)
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens

    def _items(self, inputs: dict[str, Any], num_items: Any) -> float:
        """What SFTTrainer's gradient of this micro-batch is divided by, in tokens."""
        if num_items is not None:
            return max(float(num_items), 1.0)
        return max(len(answer_positions(inputs["labels"])), 1.0) * self.current_gradient_accumulation_steps

    def _micro_index(self) -> int:
        """Number of the micro-batch in the run: from the trainer's state, so that a resumed run counts on."""
        update, micro = self._micro
        if update != self.state.global_step:
            update, micro = self.state.global_step, -1
        self._micro = (update, micro + 1)
        return update * self.args.gradient_accumulation_steps + micro + 1

    def _independent_batch(self, index: int) -> Any:
        """Micro-batch `index` of an own shuffle of the training set, by number: nothing to save for a resume."""
        dataset: Any = self.train_dataset
        size, wanted = len(dataset), self._train_batch_size
        rows = []
        for position in range(index * wanted, (index + 1) * wanted):
            epoch, place = divmod(position, size)
            rows.append(dataset[int(self._shuffle(epoch, size)[place])])
        return self._prepare_inputs(self.data_collator(rows))

    def _shuffle(self, epoch: int, size: int) -> torch.Tensor:
        """The ascent's own order of an epoch; the newest is kept."""
        if self._order is None or self._order[0] != epoch:
            seed = torch.Generator().manual_seed((self.args.seed + 1) * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(size, generator=seed))
        return self._order[1]

    # -- what is logged and saved --------------------------------------------------------------------------------------

    def _note(self, record: Record) -> None:
        """Metrics beside the loss, averaged by SFTTrainer over the logging interval; and the live advice."""
        self.last_record = record
        metrics = self._metrics["train"]
        metrics["lfu/skipped"].append(float(record.skipped is not None))
        metrics["lfu/lam"].append(record.lam)
        if record.tokens and record.skipped != "non-finite loss":
            metrics["lfu/sft_loss"].append(record.sft_loss)
        if record.skipped is None:
            metrics["lfu/consistency"].append(record.consistency)
            metrics["lfu/gradient_ratio"].append(record.gradient_ratio)
            metrics["lfu/gradient_cosine"].append(record.gradient_cosine)
            metrics["lfu/ascent_grad_norm"].append(record.ascent_grad_norm)
            metrics["lfu/displacement"].append(fmean(record.displacement.values()))
            if self.args.log_layers:
                for name in ("consistency_per_layer", "displacement"):
                    for layer, value in getattr(record, name).items():
                        metrics[f"lfu/{name.removesuffix('_per_layer')}/{layer:02d}"].append(value)
        if self.args.advice:
            self.advice.watch(record)
            if self._micro[1] == 0 and self._update_losses:
                self.advice.watch_loss(fmean(self._update_losses))
                self._update_losses = []
            if record.skipped is None:
                self._update_losses.append(record.sft_loss)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.step is not None and self.args.should_save:  # before trainer_state.json, which completes a checkpoint
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{STATE_FILE}.partial"
            partial.write_text(json.dumps(self.step.state_dict()))
            os.replace(partial, folder / STATE_FILE)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = Path(resume_from_checkpoint) / STATE_FILE
        if self.step is not None and state.exists():
            self.step.load_state_dict(json.loads(state.read_text()))
        elif self.step is not None and self.step.strength is not None:
            warnings.warn(f"{state} is missing: lam='auto' starts its estimate anew", LfUAdvice, stacklevel=2)


def _refuse_settings(args: LfUConfig) -> None:
    """Settings of SFTConfig that cannot work with LfU; each with the reason and the way out."""
    kwargs = args.gradient_checkpointing_kwargs or getattr(args, "activation_checkpointing_kwargs", None) or {}
    if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs={'use_reentrant': True} hides the auxiliary from autograd, so the ascent "
            "would have no gradient: leave use_reentrant at False"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optim or "layerwise" in optim:
        raise ValueError(
            f"optim={optim!r} updates weights during the backward pass, and LfU needs two backward passes at "
            "the same weights: use another optimizer, such as adamw_torch"
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True: LfU attaches and removes hooks in every step, which would compile the model anew each "
            "time; leave it off"
        )
