"""What `lfu train` chooses for few rows, and its neighbors: LfUTrainer with the choices of lfu.cli.careful, LoRA r 8.

    python -m fewrows.careful DATA RECORDS.jsonl [--rows 16 64 128] [--draws 6] [--rates 1e-4 3e-4 1e-3] [--device cpu]

The task is short instructions of Dolly with short answers, or (`--task gsm8k`) short word problems, asked without a
chat template (`--template none`), so that a run takes a minute or three of one CPU core. All methods see the same rows
in the same order, and as many updates. One record per run is appended. Runs that are there are passed over, so the same
command goes on where it stopped. DATA: the folder of fewrows.rows, or a file that `pack` made of it. Several processes
share the list when each is given its `--part`, such as 2/12.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import ProgressCallback

from fewrows.rows import Row, shaped
from fewrows.work import append
from lfu import LfUConfig, LfUTrainer
from lfu.cli import careful
from lfu.data.templates import to_training_rows
from lfu.evaluation.pieces import render_of
from lfu.evaluation.prompts import fill, shipped_templates
from lfu.evaluation.score import answer_nll, perplexity
from lfu.methods.l2sp import UPDATES
from lfu.model.loading import load_model

# measure -> how many
COUNTS = {"test": 40, "validation": 32, "train": 240, "gsm8k": 10, "dolly": 10, "lambada": 16}
WORDED = 16
# task -> the set of wordings, and those of them that training has not seen
WORDINGS = {"dolly": ("instruction", ("task", "expert")), "gsm8k": ("word_problems", ("teacher", "formal"))}


class Key(NamedTuple):
    """Which run: `share` is the pull's at the end of 60 updates, 0 without a pull."""

    rows: int
    method: str
    share: float
    rate: float
    draw: int


UNTOUCHED = Key(0, "start", 0.0, 0.0, 0)


def pack(data: Path, out: Path) -> None:
    """The rows of both tasks in one file, for a machine that lacks the data sets."""
    out.write_text(json.dumps({task: picked(data, task) for task in WORDINGS}, ensure_ascii=False), encoding="utf-8")


def picked(data: Path, task: str) -> dict[str, list[Row]]:
    """Measure -> rows. Training, validation and test rows are different ones; the other task's rows are to be kept."""
    if data.is_file():
        return json.loads(data.read_text(encoding="utf-8"))[task]
    short = _short(map(_instruction, _shuffled(data / "dolly_3k/train.jsonl")), 70, 8, 60)
    tested = [shaped("test", row) for row in _shuffled(data / "gsm8k/test.jsonl")]
    kept = {"gsm8k": [row for row in tested if row and len(row["question"]) + len(row["answer"]) <= 330]}
    if task == "gsm8k":
        trained = [shaped("train", row) for row in _shuffled(data / "gsm8k/train.jsonl")]
        kept = {"dolly": short}
        short = _short(tested, 130, 0, 110)[: COUNTS["test"]] + _short(trained, 130, 0, 110)
    found: dict[str, list[Row]] = {}
    for name in ("test", "validation", "train"):
        found[name], short = short[: COUNTS[name]], short[COUNTS[name] :]
    passages = [{"text": f"{row['context']} {row['answer']}"} for row in _shuffled(data / "lambada/test.jsonl")]
    found |= kept | {"lambada": [row for row in passages if len(row["text"]) <= 300]}
    return {name: rows[: COUNTS[name]] for name, rows in found.items()}


def _instruction(row: Row) -> Row | None:
    return None if row["input"] else {"question": row["instruction"], "answer": row["output"]}


def _short(rows: Iterable[Row | None], question: int, least: int, most: int) -> list[Row]:
    """Those with so many characters."""
    return [row for row in rows if row and len(row["question"]) <= question and least <= len(row["answer"]) <= most]


def _shuffled(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return rows


def settings(given: argparse.Namespace) -> Iterator[Key]:
    """Draw by draw, so that the list may end anywhere."""
    for draw in range(given.draws):
        for rate in given.rates:
            for rows in given.rows:
                for method in given.methods:
                    yield Key(rows, method, given.share if method == "l2sp" else 0.0, rate, draw)


def tuned(base: Any, tokenizer: Any, rows: list[Row], key: Key) -> tuple[Any, int]:
    """A copy of `base` after the run, the adapter merged into it, and its number of updates."""
    drawn = random.Random(1000 * key.rows + key.draw).sample(rows, key.rows)
    lengths: dict[str, Any] = {name: int(value) for name, value in careful.lengths(key.rows).items()}
    micro, accumulated = "per_device_train_batch_size", "gradient_accumulation_steps"
    lengths |= {micro: lengths[micro] * lengths[accumulated], accumulated: 1}  # the same update, in one go
    updates = lengths["num_train_epochs"] * -(-key.rows // lengths[micro])
    of_60 = key.share * (updates / UPDATES) ** 0.5
    with tempfile.TemporaryDirectory() as folder:
        config = LfUConfig(
            folder, method=key.method, method_args=f"share={of_60}" if key.share else None, learning_rate=key.rate,
            seed=key.draw, **lengths, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, dataloader_pin_memory=False, use_cpu=base.device.type == "cpu",
            lam="auto" if key.method == "lfu" else None,
        )  # fmt: skip
        trainer = LfUTrainer(
            copy.deepcopy(base),
            config,
            train_dataset=to_training_rows(Dataset.from_list(drawn), tokenizer=tokenizer, template="none"),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return trainer.model.merge_and_unload().float().eval(), trainer.state.global_step


@torch.no_grad()
def measured(model: Any, tokenizer: Any, rows: dict[str, list[Row]], task: str) -> dict[str, Any]:
    """Nats a token: validation and test rows, other wordings of some test rows, the other task, LAMBADA's passages."""
    bare = render_of(tokenizer, "none")  # as in training
    nll = lambda some, render=bare: answer_nll(model, tokenizer, some, batch_size=16, render=render).mean
    (kept,) = {"gsm8k", "dolly"} & rows.keys()
    kind, names = WORDINGS[task]
    texts = shipped_templates(kind)
    few = rows["test"][:WORDED]
    return {
        "validation": nll(rows["validation"]),
        "test": nll(rows["test"]),
        kept: nll(rows[kept], None if tokenizer.chat_template else bare),
        "lambada": perplexity(model, tokenizer, [row["text"] for row in rows["lambada"]]).mean,
        "wordings": {name: nll([row | {"question": fill(texts[name], row)} for row in few]) for name in names},
    }


def records_of(out: Path, study: str) -> list[dict[str, Any]]:
    """The runs of this study that a file has already."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
    return [one for line in lines if (one := json.loads(line))["study"] == study]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What is to be run, and by when."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--share", type=float, default=0.15, help="of the gradient, the pull at the end of the run")
    parser.add_argument("--task", choices=WORDINGS, default="dolly")
    parser.add_argument("--methods", nargs="+", choices=("sft", "l2sp", "lfu"), default=["sft", "l2sp"])
    parser.add_argument("--part", default="1/1", help="of the list: the first of so many processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing that would end later")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    given, began, took = arguments(argv), time.time(), 0.0
    rows = picked(given.data, given.task)
    study = " ".join(
        ["careful", *[given.task] * (given.task != "dolly"), *[Path(given.model).name] * (given.model != "smollm2")]
    )
    base, tokenizer = load_model(given.model)
    base.to(given.device)
    done = {
        UNTOUCHED if one["method"] == "start" else Key(*(one[n] for n in ("rows", "method", "weight", "rate", "draw")))
        for one in records_of(given.out, study)
    }
    part, parts = map(int, given.part.split("/"))
    listed = list(settings(given))
    for key in [UNTOUCHED] * (part == 1) + listed[part - 1 :: parts]:
        if key in done:
            continue
        if time.time() - began + 1.2 * took > given.seconds:
            break
        begun, start = time.process_time(), time.time()
        model, updates = (base, 0) if key == UNTOUCHED else tuned(base, tokenizer, rows["train"], key)
        training = time.process_time() - begun
        record = {"study": study, "rows": key.rows, "draw": key.draw, "theta": "lora", "method": key.method}
        record |= {
            "rate": key.rate,
            "updates": updates,
            "weight": key.share,
            "lam": "auto" if key.method == "lfu" else 0.0,
        }
        record |= measured(model, tokenizer, rows, given.task)
        record |= {"seconds_training": round(training, 1), "seconds": round(time.process_time() - begun, 1)}
        append(given.out, record)
        took = time.time() - start
        print(f"{time.time() - began:5.0f} s", json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
