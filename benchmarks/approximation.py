"""How close the approximate forms' gradients are to the exact consistency's, on a real model, and what each costs.

    python benchmarks/approximation.py --micro-batches 8                    # the weights held still
    python benchmarks/approximation.py --micro-batches 8 --train            # AdamW between micro-batches
    python benchmarks/approximation.py --theta full --train --forms stale=2 stale=4

The built-in word problems; theta is a LoRA of r 8 on all linear layers, or all weights. For each form: the gradient of
the consistency alone (the step's, minus SFT's), beside the exact step's at the same weights: the cosine a micro-batch
(the mean over those on which the form acts), and the cosine and the ratio of norms of the sums over a round, which is
one pass over the micro-batches. The mean over rounds is shown. Of more than 2^24 weights a fixed sample of tensors
counts (`lfu.step.gradients.sample_of`).
Time is processor time over SFT's of the same round, all forms in turn on each micro-batch; the median over rounds.

With --train the exact step's gradient moves the weights after each micro-batch, so that a stale direction is as old as
in training; without, it looks fresher. What training with a form comes to is measured on the test bed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from batches import Batch, answer_batches
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cosine_similarity

from lfu import LfUStep
from lfu.data.load import load_rows
from lfu.data.templates import to_training_rows
from lfu.model.loading import load_model
from lfu.step.gradients import sample_of
from lfu.step.record import Record

FORMS: dict[str, dict[str, Any]] = {
    "every=2": {"every": 2},
    "every=4": {"every": 4},
    "part=0.5": {"part": 0.5},
    "part=0.25": {"part": 0.25},
    "random_layers=8": {"random_layers": 8},
    "layers=early": {"layers": "early"},
    "stale=2": {"stale": 2},
    "stale=4": {"stale": 4},
    "stale=8": {"stale": 8},
    "budget=1.3": {"budget": 1.3},
}
LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}


@dataclass
class Close:
    """A form beside the exact step, over one round.

    Attributes:
        each: mean cosine of the micro-batches on which it acts.
        total, norm: cosine and ratio of norms of the sums over the round.
        time: over SFT's.
    """

    each: float
    total: float
    norm: float
    time: float


def gradient(step: LfUStep, batch: Batch) -> tuple[torch.Tensor, float, Record]:
    """The gradient `(parameters,)` on the sample of theta, left on all of theta, too; and the processor seconds."""
    theta = step.anatomy.theta()
    for p in theta:
        p.grad = None
    begin = time.process_time()
    record = step(batch)
    spent = time.process_time() - begin
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in sample_of(theta)]
    return torch.cat([g.flatten() for g in gradients]), spent, record


def one_round(
    plain: LfUStep,
    exact: LfUStep,
    forms: Mapping[str, LfUStep],
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Close]:
    """Every step on each of the micro-batches; then `optimizer`, if any, moves theta by the exact step's gradient.

    Args:
        plain: SFT alone (`lam=0`).
        exact: the exact step; last in turn, so that its gradient is the one on theta.
        forms: the approximate steps, on the same model.
    """
    steps = {"sft": plain, **forms, "exact": exact}
    seconds = dict.fromkeys(steps, 0.0)
    totals: dict[str, torch.Tensor] = {}
    cosines: dict[str, list[float]] = {name: [] for name in steps}
    for batch in batches:
        found, acting = {}, []
        for name, step in steps.items():
            found[name], spent, record = gradient(step, batch)
            seconds[name] += spent
            acting += [name] * (record.form != "not due")
        if optimizer is not None:
            optimizer.step()
        base = found.pop("sft")
        found = {name: value - base for name, value in found.items()}
        for name, value in found.items():
            totals[name] = totals[name] + value if name in totals else value
            if name in acting:
                cosines[name].append(float(cosine_similarity(value, found["exact"], dim=0)))
    return {name: _close(name, totals, cosines[name], seconds) for name in found}


def _close(
    name: str, totals: Mapping[str, torch.Tensor], cosines: Sequence[float], seconds: Mapping[str, float]
) -> Close:
    total, exact = totals[name], totals["exact"]
    return Close(
        each=statistics.fmean(cosines) if cosines else 0.0,
        total=float(cosine_similarity(total, exact, dim=0)),
        norm=float(total.norm() / exact.norm()),
        time=seconds[name] / seconds["sft"],
    )


def table(rounds: Sequence[Mapping[str, Close]]) -> str:
    """Markdown: means over the rounds, of the time the median and the range."""
    lines = [
        "| form | cosine a micro-batch | cosine of the sum | norm of the sum, x exact | time, x SFT | its range |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("exact", *(name for name in rounds[0] if name != "exact")):
        found = [one[name] for one in rounds]
        means = [statistics.fmean(getattr(one, what) for one in found) for what in ("each", "total", "norm")]
        times = [one.time for one in found]
        cells = [f"{means[0]:.3f}", f"{means[1]:.3f}", f"{means[2]:.2f}", f"{statistics.median(times):.2f}"]
        lines.append(f"| {' | '.join([name, *cells, f'{min(times):.2f} to {max(times):.2f}'])} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--theta", choices=tuple(LEARNING_RATES), default="lora")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), metavar="FORM")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a round (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="AdamW moves the weights after each micro-batch")
    parser.add_argument("--learning-rate", type=float, help="of --train (default: 1e-4, of all weights 1e-5)")
    return parser


def make_theta(base: Any, theta: str) -> Any:
    """The model to train: `base` itself, or a LoRA on it whose B is not zero, as after a few updates."""
    if theta == "full":
        return base.train()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    for name, parameter in model.named_parameters():  # a fresh adapter's B is zero, and A's gradient with it
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model


def main() -> None:
    parser = make_parser()
    given = parser.parse_args()
    if min(given.micro_batches, given.rows, given.rounds) < 1:
        parser.error("--micro-batches, --rows and --rounds must be at least 1")
    torch.manual_seed(0)
    base, tokenizer = load_model(given.model, trainable=True)
    model = make_theta(base, given.theta)
    rows = list(
        to_training_rows(
            load_rows(f"word_problems:{given.micro_batches * given.rows}"), template="chat", tokenizer=tokenizer
        )
    )
    batches = answer_batches(tokenizer, rows, given.rows)
    plain, exact = LfUStep(model, lam=0.0), LfUStep(model)
    forms = {name: LfUStep(model, **FORMS[name]) for name in given.forms}
    optimizer = None
    if given.train:
        rate = given.learning_rate or LEARNING_RATES[given.theta]
        optimizer = torch.optim.AdamW(exact.anatomy.theta(), lr=rate)
    for step in (plain, LfUStep(model)):
        gradient(step, batches[0])  # warms up
    rounds = []
    for number in range(given.rounds):
        rounds.append(one_round(plain, exact, forms, batches, optimizer))
        print(f"round {number + 1} of {given.rounds}", file=sys.stderr, flush=True)
    print(table(rounds))


if __name__ == "__main__":
    main()
