"""Our methods in the form of PEFT's method_comparison on MetaMathQA.

    python scripts/peft_metamath.py rows                                   # the data, from the hub, into peft-metamath/
    lfu compare --preset peft-metamath                                     # on one large GPU
    python scripts/peft_metamath.py form runs/peft-metamath/record.json    # accuracy, forgetting, memory, time

Rows and settings follow PEFT's: query template, texts of at most 1,300 characters, 5,000 steps of 4 rows, AdamW, 1e-4.
Two things differ: rows are not sorted into buckets by length, and forgetting is measured on the Wikipedia texts that
`rows` writes, not on PEFT's. So compare within one table, and with PEFT's LoRA through the `sft` row here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

QUERY = "Question: {query} Think step by step.\nAnswer:"  # PEFT's default_training_params.json
LONGEST = 1300  # characters of question and answer (PEFT's data.py)
VALIDATION, TEXTS = 50, 200


def prompt_row(query: str, response: str) -> dict[str, str]:
    """One row, as PEFT puts it together: nothing between the template and the answer but what is there."""
    return {"prompt": QUERY.format(query=query), "completion": f" {response}"}


def training_rows(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """MetaMathQA's rows (`query`, `response`), the long ones left out."""
    short = (row for row in rows if len(f"{row['query']} {row['response']}") <= LONGEST)
    return [prompt_row(row["query"], row["response"]) for row in short]


def write_rows(folder: Path) -> None:
    """Training, validation and test rows and the texts to keep, from the hub."""
    from datasets import load_dataset

    gsm8k = load_dataset("openai/gsm8k", "main")
    questions = {
        name: [prompt_row(row["question"], row["answer"]) for row in gsm8k[name]] for name in ("train", "test")
    }
    articles = load_dataset("wikimedia/wikipedia", "20231101.en", split="train", streaming=True)
    texts = [{"text": article["text"][:4000]} for article in articles.take(TEXTS)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in {
        "train": training_rows(load_dataset("meta-math/MetaMathQA", split="train")),
        "validation": questions["train"][:VALIDATION],
        "test": questions["test"],
        "wikipedia": texts,
    }.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(found):,} rows")


def in_peft_form(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per method, with the names of PEFT's result files; `forgetting` is in nats per token, more is worse.

    Raises:
        ValueError: the record is not of that preset.
    """
    results = record["results"]
    mode = results["modes"].get("steps", {})
    if not {"match", "kept:wikipedia"} <= set(results["metrics"]):
        raise ValueError("the record has no solved problems or no Wikipedia: it is not one of --preset peft-metamath")
    entries = []
    for label, cost in mode["cost"].items():
        of = lambda table, key, label=label: mode[table][key][label]
        entries.append({
            "experiment_name": label,
            "train_config": {"model_id": record["settings"]["model"], "max_steps": cost["steps"]},
            "test accuracy": of("values", "match")["mean"],
            "forgetting": of("against_untouched", "kept:wikipedia")["value"],
            "accelerator_memory_max": cost["peak_memory"],
            "train_time": cost["train_seconds"],
            "num_trainable_params": cost["trainable"],
        })  # fmt: skip
    return entries


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows", help="write the data")
    rows.add_argument("--folder", type=Path, default=Path("peft-metamath"))
    form = commands.add_parser("form", help="print a study's results in PEFT's form")
    form.add_argument("record", type=Path)
    given = parser.parse_args(argv)
    if given.command == "rows":
        write_rows(given.folder)
        return 0
    try:
        entries = in_peft_form(json.loads(given.record.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        print(f"peft_metamath: {given.record}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(entries, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
