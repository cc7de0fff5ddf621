"""How close the approximate forms' gradients are to the exact consistency's, on a real model.

    python benchmarks/approximation.py --model smollm2 --micro-batches 8

LoRA r 8 on all linear layers, the built-in word problems, the weights held still. For each form: the gradient of the
consistency alone (the step's, minus SFT's), summed over all micro-batches, beside the exact step's: cosine, and ratio
of norms. Beside it the processor time of its micro-batches over SFT's. Weights that stand still make a stale direction
look fresher than in training; what training with it comes to is measured on the test bed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lfu import LfUStep
from lfu.data.load import load_rows
from lfu.data.templates import to_training_rows
from lfu.models import load_model
from lfu.study.rows import pair_of

FORMS: dict[str, dict[str, Any]] = {
    "exact": {},
    "every=2": {"every": 2},
    "every=4": {"every": 4},
    "part=0.5": {"part": 0.5},
    "part=0.25": {"part": 0.25},
    "random_layers=8": {"random_layers": 8},
    "layers=early": {"layers": "early"},
    "stale=4": {"stale": 4},
    "stale=8": {"stale": 8},
}


def make_batches(tokenizer: Any, count: int, rows: int) -> list[dict[str, torch.Tensor]]:
    """Right-padded micro-batches of `rows` word problems, the loss on the answers."""
    problems = to_training_rows(load_rows(f"word_problems:{count * rows}"), template="chat", tokenizer=tokenizer)
    pairs = [[tokenizer(part, add_special_tokens=False)["input_ids"] for part in pair_of(tokenizer, row)]
             for row in problems]  # fmt: skip
    batches = []
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        width = max(len(prompt) + len(answer) for prompt, answer in part)
        batches.append({
            "input_ids": torch.tensor([_filled(p + a, 0, width) for p, a in part]),
            "attention_mask": torch.tensor([_filled([1] * len(p + a), 0, width) for p, a in part]),
            "labels": torch.tensor([_filled([-100] * len(p) + a, -100, width) for p, a in part]),
        })  # fmt: skip
    return batches


def _filled(values: list[int], filler: int, width: int) -> list[int]:
    return values + [filler] * (width - len(values))


def gradient(model: Any, batches: list[dict[str, torch.Tensor]], **options: Any) -> tuple[torch.Tensor, float]:
    """The gradient `(parameters,)` summed over the micro-batches, and the processor seconds."""
    step = LfUStep(model, **options)
    model.zero_grad()
    begin = time.process_time()
    for batch in batches:
        step(batch)
    taken = time.process_time() - begin
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch (default: %(default)s)")
    given = parser.parse_args()
    torch.manual_seed(0)
    base, tokenizer = load_model(given.model, trainable=True)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    for name, parameter in model.named_parameters():  # a fresh adapter's B is zero, and A's gradient with it
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    batches = make_batches(tokenizer, given.micro_batches, given.rows)
    gradient(model, batches[:1], lam=0.0)  # warms up
    plain, unit = gradient(model, batches, lam=0.0)
    exact = None
    print("| form | cosine with the exact gradient | norm, x exact | time, x SFT |\n| --- | --- | --- | --- |")
    for name, options in FORMS.items():
        whole, taken = gradient(model, batches, **({"lam": 1.0} | options))
        found = whole - plain
        exact = found if exact is None else exact
        cosine = float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
        print(f"| {name} | {cosine:.3f} | {float(found.norm() / exact.norm()):.2f} | {taken / unit:.2f} |", flush=True)


if __name__ == "__main__":
    main()
