"""One run: a plain loop over LfUStep, so that nothing but the step and the optimizer takes time."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from fewrows.rows import Row
from fewrows.runs import Run
from lfu import LfUStep
from lfu.evaluation.pieces import chat_pair
from lfu.step.step import sft_loss

LONGEST = 512  # tokens of a row


def tuned(base: Any, tokenizer: Any, rows: Sequence[Row], run: Run) -> tuple[Any, dict[str, Any]]:
    """A copy of `base` (float32) after the run, any adapter merged into it, and what the training said of itself."""
    torch.manual_seed(run.draw)
    model = model_of(base, run)
    theta = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in theta] if run.method == "l2sp" and run.theta == "full" else []
    optimizer = torch.optim.AdamW(theta, lr=run.rate, weight_decay=0.0, fused=theta[0].is_cuda)
    make = get_cosine_schedule_with_warmup if run.study == "paper" else get_linear_schedule_with_warmup
    schedule: LambdaLR = make(optimizer, max(1, run.updates // 10), run.updates)
    mixed = run.study == "paper"
    device = theta[0].device.type
    autocast = lambda: torch.autocast(device, torch.bfloat16) if mixed else nullcontext()
    loss = lambda model, batch, items: _in(autocast, sft_loss, model, batch, items)
    step = LfUStep(model, alpha=0.1, lam=run.lam, seed=run.draw, loss_fn=loss, autocast=autocast)
    batches = batches_of(tokenizer, rows, run, theta[0].device)
    records = []
    for batch in batches:
        records.append(step(batch))
        if start:
            torch._foreach_add_([p.grad for p in theta], torch._foreach_sub(theta, start), alpha=run.weight)
        elif run.method == "l2sp":
            (run.weight / 2 * adapter_distance(model)).backward()
        torch.nn.utils.clip_grad_norm_(theta, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    last = records[-len(records) // 4 :]
    mean = lambda name: sum(getattr(record, name) for record in last) / max(len(last), 1)
    said = {name: mean(name) for name in ("sft_loss", "gradient_ratio", "gradient_cosine", "consistency")}
    said |= {"lam_used": mean("lam"), "skipped": sum(record.skipped is not None for record in records)}
    return merged(model), said


def model_of(base: Any, run: Run) -> Any:
    """A copy to train. For the paper's runs the base in bf16, the adapter in float32 under autocast, as TRL has it."""
    model = copy.deepcopy(base).train()
    if run.theta == "full":
        return model
    if run.study == "paper":
        model = model.to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    return model


def merged(model: Any) -> Any:
    """The model alone, in float32."""
    model = model.float()
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model).eval()


def adapter_distance(model: Any) -> torch.Tensor:
    """`||scaling B A||^2` over all layers, without forming the products: how far a fresh adapter moved the weights."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for module in model.modules():
        if "default" in getattr(module, "lora_A", {}):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            total = total + module.scaling["default"] ** 2 * ((B.T @ B) * (A @ A.T)).sum()
    return total


def batches_of(tokenizer: Any, rows: Sequence[Row], run: Run, device: Any) -> list[dict[str, torch.Tensor]]:
    """One batch an update: epochs in random order over the draw's rows, the same for every method."""
    source = random.Random(1000 * run.rows + run.draw)
    drawn = [tokens_of(tokenizer, row) for row in source.sample(list(rows), min(run.rows, len(rows)))]
    order: list[int] = []
    while len(order) < run.updates * run.batch:
        order += source.sample(range(len(drawn)), len(drawn))
    picks = [order[i * run.batch : (i + 1) * run.batch] for i in range(run.updates)]
    return [padded([drawn[i] for i in pick], tokenizer.pad_token_id or 0, device) for pick in picks]


def tokens_of(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    """A row's tokens and where its answer begins."""
    prompt, answer = chat_pair(tokenizer, row)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return (before + tokenizer(answer, add_special_tokens=False)["input_ids"])[:LONGEST], len(before)


def padded(rows: Sequence[tuple[list[int], int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels`, `(B, T)`."""
    width = max(len(ids) for ids, _ in rows)
    fill = lambda values, with_: values + [with_] * (width - len(values))
    batch = {
        "input_ids": [fill(ids, pad) for ids, _ in rows],
        "attention_mask": [fill([1] * len(ids), 0) for ids, _ in rows],
        "labels": [fill([-100] * start + ids[start:], -100) for ids, start in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def _in(context: Any, call: Any, *arguments: Any) -> Any:
    with context():
        return call(*arguments)
