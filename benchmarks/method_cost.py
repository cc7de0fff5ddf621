"""What a training step of each method costs beside SFT's, in one run: the figures of `lfu methods` and docs/methods.md.

    python benchmarks/method_cost.py --write src/lfu/methods/costs.json

Per theta (LoRA r 8 on all linear layers, or all weights) and method: a trainer of SFT's and one of the method's, each
on a model of its own, take steps in turn; the median of the ratios of neighbours counts. A step is forward, backward
and what the method does before and after the optimizer, without the optimizer itself, on 4 rows of up to 128 tokens.
What a method does once, before or after training, is not in it. With `--methods`, the other figures of a JSON that is
there stay.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src")]

from stepcost.cases import make_batch  # noqa: E402

from lfu import LfUConfig, LfUTrainer  # noqa: E402
from lfu.data.word_problems import word_problems  # noqa: E402
from lfu.evaluation.record import machine, versions  # noqa: E402
from lfu.methods import REGISTRY, method_class  # noqa: E402
from lfu.model.loading import load_model  # noqa: E402
from lfu.support.files import dump_json, write_text  # noqa: E402

# What a method can't do without. The rewriting, mixing and calibrating itself is not timed.
ARGS = {"wise": "wise.alpha=0.5", "lines": "lines.alpha=0.5", "anchor": "anchor.texts=4", "ewc": "ewc.texts=4"}
BESIDE_TRAINING = ("sdft", "replay", "im", "stm", "lines")  # they change rows or the result: a step is SFT's


def trainer_of(method: str, theta: str, model_name: str, folder: Path) -> LfUTrainer:
    from datasets import Dataset
    from peft import LoraConfig

    torch.manual_seed(0)
    model, tokenizer = load_model(model_name)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in word_problems("train", 8)
    ]
    config = LfUConfig(
        str(folder), method=method, method_args=ARGS.get(method), report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, per_device_train_batch_size=4, gradient_accumulation_steps=1, disable_tqdm=True,
        max_length=128, advice=False,
    )  # fmt: skip
    peft = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear") if theta == "lora" else None
    trainer = LfUTrainer(
        model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def seconds(trainer: LfUTrainer, batch: dict[str, torch.Tensor]) -> float:
    trainer.model.zero_grad()
    items = int((batch["labels"][:, 1:] != -100).sum())
    # with one thread, processor time: other programs don't disturb it
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    trainer.training_step(trainer.model, dict(batch), num_items_in_batch=items)
    for method in trainer.methods:
        method.before_update(trainer)
        method.after_update(trainer)
    spent = clock() - start
    trainer._metrics["train"].clear()
    return spent


def ratio_of(method: str, theta: str, sft: LfUTrainer, options: argparse.Namespace, folder: Path) -> float | None:
    """Median of the method's time over SFT's next to it; None where the method refuses this theta."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            trainer = trainer_of(method, theta, options.model, folder)
    except ValueError as error:
        print(f"{theta:5} {method:10} refused: {error}", file=sys.stderr)
        return None
    torch.manual_seed(0)
    batch = make_batch(4, 128, trainer.model.config.vocab_size)
    ratios = []
    for round_ in range(options.rounds + 1):  # the first round warms up
        plain = seconds(sft, batch)
        spent = seconds(trainer, batch)
        if round_:
            ratios.append(spent / plain)
    print(f"{theta:5} {method:10} {statistics.median(ratios):.3f}  {[round(r, 2) for r in ratios]}", file=sys.stderr)
    return round(statistics.median(ratios), 3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    ratio: dict[str, dict[str, float | None]] = {name: {} for name in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        for theta in options.theta:
            sft = trainer_of("sft", theta, options.model, Path(folder))
            for name in options.methods:
                steps_as_sft = name in BESIDE_TRAINING
                ratio[name][theta] = (
                    1.0 if steps_as_sft or name == "sft" else ratio_of(name, theta, sft, options, Path(folder))
                )
                gc.collect()
            del sft
            gc.collect()
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)}"
    what = "SmolLM2-135M-Instruct" if options.model == "smollm2" else options.model
    return {
        "how": f"{what}, float32, 4 x 128 tokens, {threads}, median of {options.rounds} pairs.",
        "command": " ".join(["python", "benchmarks/method_cost.py", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "ratio": ratio,
    }


def markdown(costs: dict[str, Any]) -> str:
    lines = ["| method | LoRA theta | full theta | once |", "| --- | --- | --- | --- |"]
    for name, ratio in costs["ratio"].items():
        cells = [f"{ratio[theta]:.2f}" if ratio.get(theta) else "refused" for theta in ("lora", "full")]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {method_class(name).once} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", choices=list(REGISTRY), default=list(REGISTRY))
    parser.add_argument("--theta", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the JSON there, or update the one there")
    parser.add_argument("--table", type=Path, metavar="PATH", help="measure nothing: print that JSON as markdown")
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(options.table.read_text())))
        return
    costs = measure(options)
    if options.write and options.write.exists():  # each ratio is of a pair of its own: what is not measured now stays
        old, new = json.loads(options.write.read_text())["ratio"], costs["ratio"]
        costs["ratio"] = {name: old.get(name, {}) | new.get(name, {}) for name in REGISTRY if name in (*old, *new)}
    if options.write:
        write_text(options.write, dump_json(costs) + "\n")
    else:
        print(dump_json(costs))


if __name__ == "__main__":
    main()
