"""A trainer on a tiny random model, and the gradient that one micro-batch leaves: what every method is tried on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import DEVICE, Float64Throughout, gradients, tiny_batch, tiny_model
from tiny_folder import byte_tokenizer
from torch.utils.checkpoint import checkpoint

from lfu import LfUConfig, LfUTrainer


def small_model(family: str = "llama", **options: Any) -> Any:
    """`tiny_model` of two layers: what a method does to one layer after the other shows on two."""
    return tiny_model(family, **({} if family == "gpt2" else {"num_hidden_layers": 2}) | options)


def config(folder: Path | str, method: str = "sft", **options: Any) -> LfUConfig:
    """Quick settings; `options` win."""
    base = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=3, gradient_accumulation_steps=1,
        learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=DEVICE == "cpu", bf16=False, disable_tqdm=True, max_length=32, seed=7, advice=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    return LfUConfig(**{**base, "method": method, **options})


def tiny_trainer(
    method: str,
    folder: Path | str,
    *,
    theta: str = "full",
    dtype: torch.dtype = torch.float64,
    model: Any = None,
    rows: list[dict[str, Any]] | None = None,
    eval_rows: list[dict[str, Any]] | None = None,
    peft_config: LoraConfig | None = None,
    **options: Any,
) -> LfUTrainer:
    """An LfUTrainer with `method` on a tiny Llama of two layers, theta full, lora, dora or subset (see `tiny_model`).

    `lora` here is an adapter with a non-zero B, as after some training; give `peft_config` for a fresh one.
    """
    data = Dataset.from_list(rows or token_rows())
    return LfUTrainer(
        model=small_model(theta=theta, dtype=dtype) if model is None else model,
        args=config(folder, method, **options),
        train_dataset=data,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )


def token_rows(count: int = 6, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows that TRL takes as they are: `input_ids` and `labels`."""
    batch = tiny_batch(seed, rows=count)
    return [
        {"input_ids": ids[mask.bool()].tolist(), "labels": labels[mask.bool()].tolist()}
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])
    ]


class PlainHead:
    """What the fused head of TRL 1.15 computes, as it is defined. TRL's own works in float32, whatever the dtype."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs):
        log_p = (hidden @ weight.T).log_softmax(-1)
        at_target = log_p.gather(-1, targets[:, None])[:, 0]
        return at_target, -(log_p.exp() * log_p).sum(-1), None, None, log_p.argmax(-1) == targets


@contextmanager
def float64() -> Iterator[None]:
    """Everything in float64, TRL's head too."""
    head = mock.patch("trl.trainer.utils._ChunkedLogProbFunction", PlainHead, create=True)  # TRL 0.24 has none
    again = partial(checkpoint, context_fn=lambda: (nullcontext(), Float64Throughout()))  # TRL 1.9, 1.14 recompute it
    with Float64Throughout(), head, mock.patch("torch.utils.checkpoint.checkpoint", again):
        yield


def step_of(
    trainer: LfUTrainer,
    batch: dict[str, torch.Tensor] | None = None,
    *,
    accumulate: int = 1,
    num_items: int | None = -1,
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of one micro-batch, in float64 throughout. num_items: -1 counts the batch's own labels."""
    batch = tiny_batch() if batch is None else batch
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = accumulate
    items = int((batch["labels"][:, 1:] != -100).sum()) if num_items == -1 else num_items
    with float64():
        loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=items)
    return float(loss), gradients(trainer.model)


def written_out(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a loss that a test wrote from the equation."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found)}


def logits(model: Any) -> torch.Tensor:
    """(3, 10, V), on the tiny batch. Not with its labels: then a model that TRL 1.9 or 1.14 has patched gives none."""
    batch = tiny_batch()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def forward(model: Any, batch: dict[str, torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
    """(logits (N, V), labels (N,), hidden states: K tensors (N, d)) at the positions that predict a label."""
    batch = tiny_batch() if batch is None else batch
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with Float64Throughout():
        out = model(**inputs, output_hidden_states=True, use_cache=False)
    labels = batch["labels"][:, 1:]
    where = labels != -100
    return out.logits[:, :-1][where], labels[where], [h[:, :-1][where] for h in out.hidden_states[1:]]
