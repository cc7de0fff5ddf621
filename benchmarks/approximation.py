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
from batches import answer_batches
from peft import LoraConfig, get_peft_model

from lfu import LfUStep
from lfu.data.load import load_rows
from lfu.data.templates import to_training_rows
from lfu.models import load_model

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
    problems = load_rows(f"word_problems:{given.micro_batches * given.rows}")
    rows = to_training_rows(problems, template="chat", tokenizer=tokenizer)
    batches = answer_batches(tokenizer, list(rows), given.rows)
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
