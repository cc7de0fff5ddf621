"""The rows of the study on real data (docs/results.md), drawn from local copies of public sets.

    python benchmarks/study_rows.py DATA_DIR OUT --train 64

DATA_DIR holds `gsm8k`, `dolly_3k`, `mmlu`, `arc_easy`, `lambada`, `truthfulqa`, a folder each with JSON lines. Short
items are taken, so that many fit into an hour of CPU time; what is drawn is fixed by the seed. Training, validation and
test rows never overlap, nor do the Dolly rows that are kept as a measure and those that are trained on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfu.support.files import write_text

SEED = 0
Row = dict[str, Any]


def drawn(file: Path, count: int, take: Callable[[Row], Row | None]) -> list[Row]:
    """`count` rows in random order, each as `take` shapes it; those that it turns down (None) are passed over."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(SEED).shuffle(rows)
    taken = [shaped for row in rows if (shaped := take(row)) is not None][:count]
    if len(taken) < count:
        raise SystemExit(f"{file}: only {len(taken)} rows are short enough, {count} are wanted")
    return taken


def solved(row: Row) -> Row | None:
    """A word problem of GSM8K with its worked answer, the calculator's marks taken off."""
    answer = "".join(part.rpartition(">>")[2] for part in row["answer"].split("<<"))
    short = len(row["question"]) + len(answer) <= 330
    return {"question": row["question"], "answer": answer} if short else None


def instruction(row: Row) -> Row | None:
    """A row of Dolly without context."""
    short = not row["input"] and 20 <= len(row["output"]) <= 300
    return {"instruction": row["instruction"], "output": row["output"]} if short else None


def choice(row: Row) -> Row | None:
    """A short question with its choices."""
    short = len(row["question"]) <= 160 and max(map(len, row["choices"])) <= 40
    return {"question": row["question"], "choices": row["choices"], "answer": row["answer"]} if short else None


def truthful(row: Row) -> Row | None:
    """TruthfulQA with one right choice."""
    choices = row["mc1_choices"]
    short = len(choices) <= 5 and max(map(len, choices)) <= 80
    return {"question": row["question"], "choices": choices, "answer": row["mc1_answer"]} if short else None


def passage(row: Row) -> Row | None:
    """A passage of LAMBADA with its last word, as a text."""
    text = f"{row['context']} {row['answer']}"
    return {"text": text} if len(text) <= 450 else None


def write(out: Path, name: str, rows: list[Row]) -> None:
    write_text(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=64, help="training rows of each set (default: %(default)s)")
    parser.add_argument("--test", type=int, default=48, help="test rows of each set (default: %(default)s)")
    parser.add_argument("--kept", type=int, default=36, help="items of each retention set (default: %(default)s)")
    given = parser.parse_args()
    data, out = given.data, given.out
    out.mkdir(parents=True, exist_ok=True)
    validation = 16
    problems = drawn(data / "gsm8k/train.jsonl", given.train + validation, solved)
    write(out, "gsm8k-train", problems[validation:])
    write(out, "gsm8k-validation", problems[:validation])
    write(out, "gsm8k-test", drawn(data / "gsm8k/test.jsonl", given.test, solved))
    dolly = drawn(data / "dolly_3k/train.jsonl", given.kept + given.test + validation + given.train, instruction)
    for name, count in (("dolly", given.kept), ("dolly-test", given.test), ("dolly-validation", validation)):
        write(out, name, dolly[:count])
        dolly = dolly[count:]
    write(out, "dolly-train", dolly)
    for name, file, take in (
        ("mmlu", "mmlu/test.jsonl", choice),
        ("arc", "arc_easy/test.jsonl", choice),
        ("truthfulqa", "truthfulqa/mc.jsonl", truthful),
        ("lambada", "lambada/test.jsonl", passage),
    ):
        write(out, name, drawn(data / file, given.kept, take))


if __name__ == "__main__":
    main()
