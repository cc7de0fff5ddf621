"""One of many processes that take runs off one list, until the time is up. A record a run, appended at once.

    python -m fewrows.work --rows ROWS.json --out RECORDS.jsonl --claims FOLDER --seconds 240 [--device cuda]

A run is taken by creating its file in the folder of claims. Nothing is begun that would not end in time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from fewrows.measure import measured
from fewrows.runs import Run, all_runs
from fewrows.train import tuned
from lfu.model.loading import load_model
from lfu.support.errors import one_line


class Clock:
    """Seconds left, and how long a run of a cost takes by what was seen."""

    def __init__(self, end: float):
        self.end, self.training, self.measuring = end, 0.2, 8.0

    def fits(self, run: Run) -> bool:
        return time.time() + 1.25 * (run.cost * self.training + self.measuring) < self.end

    def learn(self, run: Run, training: float, measuring: float) -> None:
        if run.cost:
            self.training = training / run.cost
        self.measuring = measuring


def claimed(folder: Path, number: int) -> bool:
    """Whether the run is now ours; False: another process has it."""
    try:
        os.close(os.open(folder / f"{number}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def append(out: Path, record: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(record) + "\n")


def work(given: argparse.Namespace, end: float) -> int:
    """The number of runs done."""
    torch.backends.cuda.matmul.allow_tf32 = True
    rows = json.loads(given.rows.read_text(encoding="utf-8"))
    base, tokenizer = load_model(given.model)
    base.to(given.device)
    clock, done = Clock(end), 0
    runs = all_runs()[:: given.every]
    for number, run in enumerate(runs):
        if not clock.fits(run) or not claimed(given.claims, number):
            continue
        begun, record = time.time(), run.record()
        try:
            record |= _one(base, tokenizer, rows, run, given, clock)
        except Exception as error:
            traceback.print_exc()
            record["failed"] = one_line(error)[:300]
        record["seconds"] = round(time.time() - begun, 2)
        append(given.out, record)
        done += 1
        if given.device == "cuda":
            torch.cuda.empty_cache()
    return done


def _one(base: Any, tokenizer: Any, rows: Any, run: Run, given: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    begun = time.time()
    model, said = (base, {}) if not run.updates else tuned(base, tokenizer, rows["train"], run)
    trained = time.time()
    found = said | measured(model, tokenizer, rows, answers=not given.no_answers)
    clock.learn(run, trained - begun, time.time() - trained)
    broken = [name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        found["failed"] = f"not finite: {', '.join(broken)}"
    return found | {"seconds_training": round(trained - begun, 2)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--claims", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="from now; the next run must end by then")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--every", type=int, default=1, help="take every n-th run of the list alone, to rehearse")
    parser.add_argument("--no-answers", action="store_true", help="no greedy answers")
    given = parser.parse_args(argv)
    end = time.time() + given.seconds
    given.claims.mkdir(parents=True, exist_ok=True)
    print(f"{work(given, end)} runs done", file=sys.stderr)


if __name__ == "__main__":
    main()
