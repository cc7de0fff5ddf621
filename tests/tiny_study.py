"""`lfu compare` and `lfu sweep` with the quickest settings, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lfu.cli import main
from lfu.study import statistics

FAST = (
    "--max_steps 3 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --gradient_checkpointing false "
    "--retention_limit 12 --robust_rows 2 --match_rows 2 --max_new_tokens 4 --learning_rate 1e-2 --seeds 1"
)
QUICK = "--measures gain --match_rows 0 --max_steps 1"


def write_questions(path: Path, count: int = 44) -> None:
    """Sums with worked answers."""
    rows = [
        {"question": f"What is {i} + {2 * i}?", "answer": f"{i} + {2 * i} = {3 * i}\n#### {3 * i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(model: str, *flags: str, verb: str = "compare", out: str = "out") -> int:
    """`lfu compare` or `lfu sweep`; a flag given twice takes its last value."""
    words = [word for flag in flags for word in flag.split()]
    fast = FAST.replace(" --learning_rate 1e-2", "") if "--learning_rates" in words else FAST
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 400)
        return main([verb, "--model", model, "--data", "rows.jsonl", "--output_dir", out, *fast.split(), *words])


def results(out: str | Path = "out"):
    return json.loads((Path(out) / "record.json").read_text())["results"]


def records(out: str | Path = "out") -> dict[str, dict]:
    """Folder name -> the record of a finished run."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(Path(out).glob("runs/*/record.json"))}


def state(out: str | Path = "out") -> dict[str, bytes]:
    """Every file of a study but what the report is made anew of: path -> bytes."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file() and path.parent != Path(out)
    }
