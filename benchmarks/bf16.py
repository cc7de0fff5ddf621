"""How far off is the consistency's gradient in bfloat16? Against float32 on the same weights, by auxiliary and alpha.

    python benchmarks/bf16.py --json bf16.json                    # tiny random models
    python benchmarks/bf16.py --model smollm2 --json bf16.json    # the embedded model: an hour of one core

Cosine and ratio of norms of the consistency's gradient (mse, all layers) with respect to theta: the same weights, rows
and random draws in bfloat16 and in float32. Theta: `lora`, a float32 adapter with B != 0 on a bfloat16 base under
autocast, as TRL trains; `full`, all weights in bfloat16. Three remedies: a larger alpha (the grid), and

- `residual`: the embedding's output in float32, so that both passes add up in float32 (under autocast);
- `tangent`: h' - h is carried through the blocks by forward-mode differentiation, so that nothing is subtracted.

`moved` is the median over layers of ||h' - h|| / ||h|| in machine epsilons of bfloat16, as the bfloat16 run sees it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.autograd.forward_ad as forward_mode  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from stepcost.cases import Case, make_batch, make_model  # noqa: E402
from torch.func import functional_call  # noqa: E402

from lfu.data.word_problems import word_problems  # noqa: E402
from lfu.evaluation.pieces import chat_pair  # noqa: E402
from lfu.model.anatomy import anatomy  # noqa: E402
from lfu.model.loading import load_model  # noqa: E402
from lfu.model.representations import Reader, answer_positions, hidden_of, with_hidden  # noqa: E402
from lfu.model.rng import generators  # noqa: E402
from lfu.model.tensors import dot, global_norm  # noqa: E402
from lfu.step.step import sft_loss  # noqa: E402
from lfu.support.files import dump_json, write_text  # noqa: E402
from lfu.undesirable import LoRA, Own, ascend, auxiliary_of  # noqa: E402

KINDS = ("lora", "steering", "own")
EPSILON = torch.finfo(torch.bfloat16).eps
Batch = dict[str, torch.Tensor]
Hidden = dict[int, torch.Tensor]


class Passes:
    """The two passes of a step on one model, written out; `residual` and `tangent` as in the text above."""

    def __init__(self, model: Any, batch: Batch, kind: str, *, mixed: bool, residual: bool = False):
        self.model, self.batch, self.mixed, self.residual = model, batch, mixed, residual
        self.parts = anatomy(model)
        self.theta = self.parts.theta()
        self.reader = Reader(self.parts, list(range(1, len(self.parts.blocks) + 1)))
        self.auxiliary = auxiliary_of(kind)
        self.auxiliary.bind(self.parts)
        self.where = answer_positions(batch["labels"])
        self.auxiliary.reset(generators(0, 0))
        with self._precision(), self.auxiliary.attached(), self.reader.reading(self.where, detach=True) as clean:
            sft_loss(model, batch, len(self.where)).backward()
        self.clean: Hidden = clean
        self.ascent = [None if g is None else g.clone() for g in self.auxiliary.take_gradients()]
        model.zero_grad()

    def gradient(self, alpha: float, tangent: bool = False) -> tuple[list[torch.Tensor], float]:
        """The consistency's gradient, a tensor for each of theta, and the median displacement in epsilons."""
        self.auxiliary.reset(generators(0, 0))
        along = self._tangents(alpha) if tangent else None
        ascend(self.auxiliary, self.ascent, alpha)
        with self._precision(), self.auxiliary.attached(), self.reader.reading(self.where, detach=False) as moved:
            self.reader.run(self.batch)
            apart = {n: moved[n].detach().float() - h.float() for n, h in self.clean.items()}
            back = {n: 2 * d / (d.numel() * len(apart)) for n, d in (along or apart).items()}
            outputs, pulls = [moved[n] for n in back], [back[n].to(moved[n].dtype) for n in back]
            found = torch.autograd.grad(outputs, self.theta, pulls, allow_unused=True)
        self.auxiliary.discard()
        whole = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.theta)]
        shift = [float(apart[n].norm() / h.float().norm()) for n, h in self.clean.items()]
        return whole, statistics.median(shift) / EPSILON

    def _tangents(self, alpha: float) -> Hidden:
        """What the ascent's step does to each layer's h, to first order."""
        norm = global_norm(self.ascent)
        steps = [None if g is None else g * (alpha / norm) for g in self.ascent]
        with torch.no_grad(), forward_mode.dual_level(), self._precision(), self._dual(steps) as call:
            with self.reader.reading(self.where, detach=False) as found:
                self.reader.run(self.batch, call)
            return {n: forward_mode.unpack_dual(h).tangent.float() for n, h in found.items()}

    @contextmanager
    def _dual(self, steps: list[torch.Tensor | None]) -> Iterator[Callable[..., Any] | None]:
        """Within it a forward carries the tangents of `steps`."""
        aux = self.auxiliary
        if isinstance(aux, Own):
            named = {n: p for n, p in self.parts.decoder.named_parameters() if p.requires_grad}
            by_id = {id(p): torch.zeros_like(p) if step is None else step for p, step in zip(self.theta, steps)}
            duals = {n: forward_mode.make_dual(p.detach(), by_id[id(p)].to(p.dtype)) for n, p in named.items()}
            yield lambda **inputs: functional_call(self.parts.decoder, duals, (), inputs)
            return
        sites: list[Any] = self.parts.blocks
        firsts: list[Any] = [None] * len(self.parts.blocks)
        if isinstance(aux, LoRA):
            sites, firsts = aux.sites, [a for a, _ in aux.pairs]
        handles = [m.register_forward_hook(_moved_by(a, s, 2.0)) for m, a, s in zip(sites, firsts, steps)]
        try:
            yield None
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16) if self.mixed else nullcontext(), self._wide_residual():
            yield

    def _wide_residual(self) -> AbstractContextManager[Any]:
        if not self.residual:
            return nullcontext()
        return self.parts.model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.float())


def _moved_by(a: torch.Tensor | None, step: torch.Tensor | None, scaling: float) -> Callable[..., Any]:
    """A hook whose output also moves by `step`: of B in `scaling B A x`, or of a steering vector."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        y = hidden_of(output)
        if step is None:
            return output
        if a is None:
            shift = step.to(y.dtype).expand_as(y)
        else:
            x = forward_mode.unpack_dual(args[0]).primal
            shift = ((x.to(y.dtype) @ a.to(y.dtype).T) @ step.to(y.dtype).T * scaling).to(y.dtype)
        zero = forward_mode.make_dual(torch.zeros_like(shift), shift.contiguous())
        return with_hidden(output, y + zero)

    return hook


def cosine_of(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return float(dot(left, right)) / (global_norm(left) * global_norm(right))


def pair(model: Any, theta: str) -> tuple[Any, Any]:
    """(float32, bfloat16) models with the same numbers, which bfloat16 can hold."""
    model = model.to(torch.bfloat16)
    if theta == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)  # as after some training
            p.data = p.data.float() if p.requires_grad else p.data
    return copy.deepcopy(model).float().train(), model.train()


def measured(
    model: Any, batch: Batch, theta: str, kinds: list[str], alphas: list[float], remedies: list[str]
) -> Iterator[dict[str, Any]]:
    """A record for each auxiliary, remedy and alpha. Remedy `float32`: float32 against itself at the smallest alpha."""
    exact_model, narrow = pair(model, theta)
    for kind in kinds:
        exact = Passes(exact_model, batch, kind, mixed=False)
        right = {alpha: exact.gradient(alpha)[0] for alpha in alphas}
        for remedy in remedies:
            if remedy == "residual" and theta == "full":
                continue  # bfloat16 weights do not multiply float32 without autocast
            passes = Passes(narrow, batch, kind, mixed=theta == "lora", residual=remedy == "residual")
            for alpha in alphas:
                found, moved = passes.gradient(alpha, tangent=remedy == "tangent")
                norm = global_norm(found) / global_norm(right[alpha])
                yield {"theta": theta, "auxiliary": kind, "remedy": remedy, "alpha": alpha, "moved": moved,
                       "cosine": cosine_of(found, right[alpha]), "norm": norm}  # fmt: skip
        first = min(alphas)
        for alpha in alphas:
            norm = global_norm(right[alpha]) / global_norm(right[first])
            yield {"theta": theta, "auxiliary": kind, "remedy": "float32", "alpha": alpha, "moved": 0.0,
                   "cosine": cosine_of(right[alpha], right[first]), "norm": norm}  # fmt: skip


def embedded(rows: int) -> tuple[Any, Batch]:
    """The embedded model and some short word problems in its chat template."""
    model, tokenizer = load_model("smollm2", attn_implementation="eager")
    texts = sorted(
        (chat_pair(tokenizer, row) for row in word_problems("train", 200)), key=lambda pair: len("".join(pair))
    )
    pairs = texts[:rows]
    starts = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt, _ in pairs]
    whole = tokenizer([a + b for a, b in pairs], add_special_tokens=False, padding=True, return_tensors="pt")
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, -100)
    for row, start in enumerate(starts):
        labels[row, :start] = -100
    return model, {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"], "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny", "30m"], help="smollm2, or sizes of step_cost.py")
    parser.add_argument("--theta", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--auxiliary", nargs="+", default=[*KINDS], choices=KINDS)
    parser.add_argument("--alpha", nargs="+", type=float, default=[0.03, 0.1, 0.3, 0.5, 1.0, 3.0])
    parser.add_argument("--remedy", nargs="+", default=["plain", "residual", "tangent"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True, help="written anew after each record")
    given = parser.parse_args()
    records: list[dict[str, Any]] = []
    for name in given.model:
        for theta in given.theta:
            if name == "smollm2":
                model, batch = embedded(given.rows)
            else:
                case = Case("full", name, given.rows, 48)
                model, batch = make_model(case, "eager"), make_batch(given.rows, 48, case.shape["vocab_size"])
            for one in measured(model, batch, theta, given.auxiliary, given.alpha, given.remedy):
                records.append({"model": name} | one)
                print(*(f"{v:.4g}" if isinstance(v, float) else v for v in records[-1].values()), flush=True)
                write_text(given.json, dump_json(records))


if __name__ == "__main__":
    main()
