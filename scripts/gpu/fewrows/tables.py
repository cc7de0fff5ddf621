"""Tables of the records: every setting, and each method at what validation chose for it beside plain SFT.

    python -m fewrows.tables RECORDS.jsonl > tables.md

One base model: the draws of rows tell how much a figure hangs on the rows, not on the model.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# heading -> its value in a record
NAN = float("nan")  # the runs of `careful` have GSM8K in place of Dolly, and no choices
COLUMNS: dict[str, Callable[[Record], float]] = {
    "validation NLL": lambda one: one["validation"],
    "test NLL": lambda one: one["test"],
    "worst wording": lambda one: max(one["wordings"].values()),
    "spread": lambda one: statistics.stdev(one["wordings"].values()),
    "Dolly NLL": lambda one: one.get("dolly", NAN),
    "GSM8K NLL": lambda one: one.get("gsm8k", NAN),
    "LAMBADA": lambda one: one["lambada"],
    "ARC easy": lambda one: one.get("arc_easy_sure", NAN),
    "MMLU": lambda one: one.get("mmlu_sure", NAN),
    "right, %": lambda one: 100 * one.get("exact_any", NAN),
    "gradient ratio": lambda one: one.get("gradient_ratio", 0.0),
    "s training": lambda one: one["seconds_training"],
}
SETTING = ("study", "rows", "theta", "method", "rate", "updates", "weight", "lam")


def setting(one: Record) -> tuple[Any, ...]:
    return tuple(one[name] for name in SETTING)


def by_setting(records: Iterable[Record]) -> dict[tuple[Any, ...], dict[int, Record]]:
    """Setting -> draw -> record, without the runs that failed."""
    found: dict[tuple[Any, ...], dict[int, Record]] = defaultdict(dict)
    for one in records:
        if "failed" not in one:
            found[setting(one)][one["draw"]] = one
    return dict(found)


def everything(found: dict[tuple[Any, ...], dict[int, Record]]) -> str:
    """The mean over draws of every setting."""
    lines = _head([*SETTING, "draws", *COLUMNS])
    for key in sorted(found, key=str):
        draws = list(found[key].values())
        cells = [f"{statistics.fmean(map(column, draws)):.3f}" for column in COLUMNS.values()]
        lines.append(_line([*map(_short, key), str(len(draws)), *cells]))
    return "\n".join(lines)


def chosen(found: dict[tuple[Any, ...], dict[int, Record]]) -> str:
    """Each method at the setting with the least validation NLL, less SFT at its own, over the draws that both have."""
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for key in found:
        study, rows, theta, method, *_, lam = key
        if study != "start":
            groups[study, rows, theta, method, lam].append(key)
    best = {
        group: min(keys, key=lambda key: statistics.fmean(one["validation"] for one in found[key].values()))
        for group, keys in groups.items()
    }
    names = ["study", "rows", "theta", "method", "lam", "rate", "updates", "weight", "draws"]
    lines = _head([*names, *(f"{name}" for name in COLUMNS)])
    for group, key in sorted(best.items(), key=str):
        plain = found[best.get((*group[:3], "sft", 0.0), key)]
        draws = sorted(found[key].keys() & plain.keys())
        cells = []
        for column in COLUMNS.values():
            pairs = [column(found[key][d]) - column(plain[d]) for d in draws]
            if any(map(math.isnan, pairs)) or not pairs:
                cells.append("")
            elif group[3] == "sft":
                cells.append(f"{statistics.fmean(column(found[key][d]) for d in draws):.3f}")
            else:
                error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else NAN
                cells.append(f"{statistics.fmean(pairs):+.3f} ± {error:.3f}")
        lines.append(_line([*map(_short, (*group, *key[4:7])), str(len(draws)), *cells]))
    return "\n".join(lines)


def _head(names: list[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def tables(records: list[Record]) -> str:
    found = by_setting(records)
    failed = [one for one in records if "failed" in one]
    lost = "".join(f"\n- {setting(one)}, draw {one['draw']}: {one['failed']}" for one in failed)
    return "\n\n".join([
        f"{len(records)} runs, {len(failed)} failed.{lost}",
        f"## Each method at what validation chose, less SFT\n\n{chosen(found)}",
        f"## Every setting\n\n{everything(found)}",
    ])  # fmt: skip


if __name__ == "__main__":
    print(tables([json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]))
