"""What a run will need, guessed before its first step: tokens, memory, time."""

import time
from functools import cache
from typing import Any

import torch
from torch import nn

from lfu.methods.about import measured

COUNTED = 2000  # rows whose tokens are counted; further rows are assumed to be like them
EFFICIENCY = 0.5  # of a bare matrix product's speed, in a training step


def tokens_of(trainer: Any) -> tuple[int, int, int, bool]:
    """(tokens per epoch, those with a loss, tokens of the longest row, whether all rows were counted), as collated."""
    rows = trainer.train_dataset
    count = min(len(rows), COUNTED)
    columns = set(trainer._signature_columns or rows.column_names)
    total = learned = longest = 0
    for start in range(0, count, 32):
        chunk = [rows[i] for i in range(start, min(start + 32, count))]
        batch = trainer.data_collator([{k: v for k, v in row.items() if k in columns} for row in chunk])
        total += sum(len(row["input_ids"]) for row in chunk)
        longest = max(longest, *(len(row["input_ids"]) for row in chunk))
        learned += int((batch["labels"] != -100).sum())
    scale = len(rows) / max(count, 1)
    return round(total * scale), round(learned * scale), longest, count == len(rows)


def parameters(model: nn.Module) -> tuple[int, int]:
    """`(trained, all)` parameters."""
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(n for trained, n in sizes if trained), sum(n for _, n in sizes)


def expected(trainer: Any, tokens: int) -> tuple[float, float]:
    """Bytes of memory and seconds for a trainer with so many `tokens` per epoch, both within a factor of two or so.

    Memory: the weights, gradient and Adam's two moments of what is trained, and the activations of one micro-batch.
    Time: the arithmetic of all steps, at half the speed of a matrix product timed here.
    """
    args, model = trainer.args, trainer.model
    trained, total = parameters(model)
    config = model.config.get_text_config()
    rows = max(len(trainer.train_dataset), 1)
    micro = tokens / rows * args.per_device_train_batch_size
    width, depth = getattr(config, "hidden_size", 768), getattr(config, "num_hidden_layers", 12)
    kept = 4 if args.gradient_checkpointing else 34
    activations = micro * 4 * (width * depth * kept + 2 * getattr(config, "vocab_size", 32_000))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = weights + 12 * trained + activations
    passes = 4 + 2 * trained / max(total, 1) + (2 if args.gradient_checkpointing else 0)  # FLOPs per token and weight
    epochs = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps / rows
    epochs = epochs if args.max_steps > 0 else args.num_train_epochs
    weight = next(model.parameters())
    speed = EFFICIENCY * _speed(weight.device, weight.dtype)
    return memory, tokens * epochs * passes * total * cost(trainer) / speed


def cost(trainer: Any) -> float:
    """A step's time as a multiple of SFT's, as measured for the run's methods (see `lfu methods`)."""
    ratios = measured()["ratio"]
    theta = "lora" if hasattr(trainer.model, "peft_config") else "full"
    return max([1.0, *(ratios.get(m.name, {}).get(theta) or 1.0 for m in trainer.methods)])


@cache
def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product, timed for a moment."""
    size = 512 if device.type == "cpu" else 4096
    own = torch.Generator(device).manual_seed(0)  # the run's random numbers are not touched
    a = torch.randn(size, size, device=device, generator=own).to(dtype)
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < 0.03 or done < 3:
        a @ a
        done += 1
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
    return done * 2 * size**3 / spent
