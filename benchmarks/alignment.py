"""What a step against each penalty does, to first order, to what should be kept: gradients beside gradients.

    python benchmarks/alignment.py ROWS --learning_rate 5e-4 --updates 0 4 8 16

ROWS is a folder of benchmarks/study_rows.py. Plain SFT with all weights on its GSM8K rows; after so many updates it
stops, and the gradient of each term that a method adds to the loss is taken on training rows, beside the gradients of
losses that no training sees: prose, LAMBADA, Dolly, and the GSM8K test rows. Two figures for each pair:

- cosine: of the two gradients. Positive: descending the term lowers that loss, too. Negative: it raises it.
- with Adam: the same for the term's gradient as AdamW would scale it (divided by the root of its second moment, as
  SFT has left it by then); from the first update on.

Terms: SFT's own loss; LfU's consistency (Eq. 5) by auxiliary, alpha and layers; logit KL (Eq. 7); the loss on the
prompt (IM); the squared distance from the start (L2-SP); KL to the untouched model. One pass over `--rows` training
rows each, the rows that SFT has seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches import IGNORED, Batch, answer_batches, text_batches, tokens_of

from lfu import LfUStep
from lfu.data.load import load_rows
from lfu.data.probes import plain_text
from lfu.data.templates import to_training_rows
from lfu.model.loading import load_model
from lfu.step.step import sft_loss
from lfu.support.files import dump_json, write_text

# LfU's term, each by the options of its step; lam 1, so that the step's gradient less SFT's is the term's
CONSISTENCIES: dict[str, dict[str, Any]] = {
    "LfU, LoRA": {},
    "LfU, LoRA, alpha 0.001": {"alpha": 0.001, "lam": 100.0},
    "LfU, LoRA, early layers": {"layers": "early"},
    "LfU, LoRA, direction=clean": {"direction": "clean"},
    "LfU, RepS": {"auxiliary": "steering"},
    "LfU, own": {"auxiliary": "own"},
    "LfU, cosine": {"consistency": "cosine"},
    "logit KL": {"consistency": "logit_kl"},
}
Vector = torch.Tensor  # (parameters,)


def taken(model: Any) -> Vector:
    """The gradient on theta, taken off it."""
    flat = torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in model.parameters()])
    model.zero_grad()
    return flat


def loss_gradient(model: Any, batches: list[Batch]) -> Vector:
    """Of the mean negative log-likelihood a labelled token."""
    items = tokens_of(batches)
    for batch in batches:
        sft_loss(model, batch, items).backward()
    return taken(model)


def consistency_gradient(model: Any, batches: list[Batch], options: dict[str, Any], plain: Vector) -> Vector:
    """Of Eq. 5 at lam 1: what LfU's step leaves, less SFT's gradient."""
    items = tokens_of(batches)
    step = LfUStep(model, **({"lam": 1.0} | options))
    for batch in batches:
        step(batch, num_items=items)
    return taken(model) - plain


def kl_gradient(model: Any, batches: list[Batch], start: dict[str, torch.Tensor]) -> Vector:
    """Of the mean KL(untouched || theta) over the answer tokens."""
    items = tokens_of(batches)
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        answered = batch["labels"][:, 1:] != IGNORED
        with torch.no_grad():
            untouched = torch.func.functional_call(model, start, kwargs=inputs).logits[:, :-1][answered]
        ours = model(**inputs).logits[:, :-1][answered]
        value = F.kl_div(ours.log_softmax(-1), untouched.log_softmax(-1), log_target=True, reduction="sum")
        (value / items).backward()
    return taken(model)


def prompt_batches(batches: list[Batch]) -> list[Batch]:
    """The loss on the prompt's tokens instead of the answer's."""
    made = []
    for batch in batches:
        prompt = (batch["labels"] == IGNORED) & batch["attention_mask"].bool()
        made.append(batch | {"labels": torch.where(prompt, batch["input_ids"], IGNORED)})
    return made


def terms(model: Any, seen: list[Batch], start: dict[str, torch.Tensor]) -> dict[str, Callable[[Vector], Vector]]:
    """Name -> the gradient of what a method adds to the loss, given SFT's own."""
    found: dict[str, Callable[[Vector], Vector]] = {"SFT": lambda plain: plain}
    for name, options in CONSISTENCIES.items():
        found[name] = partial(consistency_gradient, model, seen, options)
    found["IM, the prompt's loss"] = lambda plain: loss_gradient(model, prompt_batches(seen))
    found["L2-SP"] = lambda plain: torch.cat(
        [(p.detach() - start[name]).flatten() for name, p in model.named_parameters()]
    )
    found["KL to the untouched model"] = lambda plain: kl_gradient(model, seen, start)
    return found


def measure(
    model: Any, seen: list[Batch], apart: dict[str, list[Batch]], start: dict[str, torch.Tensor], scale: Vector | None
) -> dict[str, Any]:
    """The losses apart from training, and each term's cosines with their gradients, plain and scaled as by Adam."""
    with torch.no_grad():
        losses = {
            name: sum(float(sft_loss(model, b, 1.0)) for b in batches) / tokens_of(batches)
            for name, batches in apart.items()
        }
    gradients = {name: loss_gradient(model, batches) for name, batches in apart.items()}
    plain = loss_gradient(model, seen)
    rows: dict[str, Any] = {}
    for name, gradient_of in terms(model, seen, start).items():
        found = gradient_of(plain)
        rows[name] = {"cosine": {each: cosine(found, other) for each, other in gradients.items()}}
        if scale is not None:
            rows[name]["with Adam"] = {each: cosine(found / scale, other) for each, other in gradients.items()}
        print(f"  {name}: {rows[name]['cosine']}", file=sys.stderr, flush=True)
    return {"losses": losses, "terms": rows}


def cosine(one: Vector, other: Vector) -> float:
    """0 where one of them is zero."""
    return round(float(F.cosine_similarity(one, other, dim=0)), 4)


def adams_scale(optimizer: torch.optim.AdamW) -> Vector | None:
    """The root of the corrected second moment, plus eps; None before the first update."""
    group = optimizer.param_groups[0]
    states = [optimizer.state[p] for p in group["params"]]
    if not states[0]:
        return None
    correct = 1 - group["betas"][1] ** float(states[0]["step"])
    return torch.cat([(s["exp_avg_sq"] / correct).sqrt().add_(group["eps"]).flatten() for s in states])


def table(found: list[dict[str, Any]], kind: str) -> str:
    """Markdown: a row a term, a column a loss and a number of updates."""
    points = [one for one in found if kind in one["terms"]["SFT"]]
    if not points:
        return ""
    names = list(points[0]["losses"])
    heads = [kind, *(f"{name}, {one['updates']}" for name in names for one in points)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for term in points[0]["terms"]:
        cells = [f"{one['terms'][term][kind][name]:+.2f}" for name in names for one in points]
        lines.append("| " + " | ".join([term, *cells]) + " |")
    losses = [f"{one['losses'][name]:.3f}" for name in names for one in points]
    return "\n".join([*lines, "| " + " | ".join(["*the loss itself*", *losses]) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a folder of benchmarks/study_rows.py")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--updates", type=int, nargs="+", default=[0, 4, 8, 16], help="of SFT, where to look")
    parser.add_argument("--seen", type=int, default=16, help="training rows of a gradient (default: %(default)s)")
    parser.add_argument("--apart", type=int, default=12, help="rows of each loss apart (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    model, tokenizer = load_model(given.model, trainable=True)
    model.train()
    shaped = lambda name: list(
        to_training_rows(load_rows(str(given.rows / f"{name}.jsonl")), template="chat", tokenizer=tokenizer)
    )
    train = shaped("gsm8k-train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(given.seed)).tolist()
    train = [train[i] for i in order]
    batches = answer_batches(tokenizer, train, 4)
    texts = [row["text"] for row in shaped("lambada")][: given.apart]
    apart = {
        "prose": text_batches(tokenizer, [row["text"] for row in plain_text()][: given.apart], 4),
        "LAMBADA": text_batches(tokenizer, texts, 4),
        "Dolly": answer_batches(tokenizer, shaped("dolly")[: given.apart], 4),
        "GSM8K test": answer_batches(tokenizer, shaped("gsm8k-test")[: given.apart], 4),
    }
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.learning_rate, weight_decay=0.0)
    total = max(len(batches), *given.updates)
    found = []
    for update in range(max(given.updates) + 1):
        if update in given.updates:
            print(f"after {update} updates", file=sys.stderr, flush=True)
            seen = answer_batches(tokenizer, train[: given.seen], 4)
            found.append({"updates": update, **measure(model, seen, apart, start, adams_scale(optimizer))})
            if given.json:
                write_text(
                    given.json, dump_json({"settings": {k: str(v) for k, v in vars(given).items()}, "found": found})
                )
        batch = batches[update % len(batches)]
        optimizer.param_groups[0]["lr"] = given.learning_rate * (1 - update / total)
        sft_loss(model, batch, tokens_of([batch])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print("\n\n".join(text for kind in ("cosine", "with Adam") if (text := table(found, kind))))


if __name__ == "__main__":
    main()
