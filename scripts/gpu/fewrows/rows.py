"""The rows that the runs train on and are measured by, picked from local copies of public sets.

    python -m fewrows.rows DATA_DIR OUT.json [SHARE]

DATA_DIR holds a folder each for gsm8k, dolly_3k, lambada, arc_easy and mmlu, with JSON lines. SHARE below 1 takes that
share of everything, for a rehearsal.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# measure -> (file, how many)
SIZES = {
    "train": ("gsm8k/train.jsonl", 2400),
    "validation": ("gsm8k/train.jsonl", 128),
    "test": ("gsm8k/test.jsonl", 256),
    "dolly": ("dolly_3k/train.jsonl", 128),
    "lambada": ("lambada/test.jsonl", 256),
    "arc_easy": ("arc_easy/test.jsonl", 160),
    "mmlu": ("mmlu/test.jsonl", 160),
}


def solved(row: Row) -> Row:
    """A word problem of GSM8K, the calculator's marks taken off its worked answer."""
    answer = "".join(part.rpartition(">>")[2] for part in row["answer"].split("<<"))
    return {"question": row["question"], "answer": answer}


def shaped(name: str, row: Row) -> Row | None:
    """The row as it is scored; None: too long."""
    if name in ("train", "validation", "test"):
        return solved(row) if len(row["question"]) + len(row["answer"]) < 900 else None
    if name == "dolly":
        short = not row["input"] and 20 <= len(row["output"]) <= 500
        return {"question": row["instruction"], "answer": row["output"]} if short else None
    if name == "lambada":
        return {"question": row["context"], "answer": row["answer"]}
    short = len(row["question"]) <= 300 and max(map(len, row["choices"])) <= 80
    return {key: row[key] for key in ("question", "choices", "answer")} if short else None


def picked(data: Path, share: float = 1.0) -> dict[str, list[Row]]:
    """Measure -> rows; training and validation rows are different ones."""
    found: dict[str, list[Row]] = {}
    used: dict[str, int] = {}
    for name, (file, count) in SIZES.items():
        lines = (data / file).read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(lines)
        taken = used.get(file, 0)
        rows = [shape for line in lines if (shape := shaped(name, json.loads(line))) is not None]
        used[file] = taken + max(2, int(count * share))
        found[name] = rows[taken : used[file]]
    return found


if __name__ == "__main__":
    share = float(sys.argv[3]) if len(sys.argv) > 3 else 1.0
    Path(sys.argv[2]).write_text(json.dumps(picked(Path(sys.argv[1]), share), ensure_ascii=False), encoding="utf-8")
