"""Training-set size as an axis: what is learned and what is forgotten with 8, 32, 128, ... training rows.

Every model starts from the same base; the rows of a smaller set are among those of a larger one. How to train is handed
in; everything here only chooses rows, measures models and keeps what was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lfu.evaluation.intervals import Interval, mean_interval, paired_difference
from lfu.evaluation.score import Progress, Render, answer_nll, multiple_choice, perplexity
from lfu.support.files import dump_json, write_text

METRICS = ("answers", "knowledge", "prose")
Scores = Mapping[str, Mapping[str, list[Any]]]  # metric -> per-item lists, as `measure` gives them
Measure = Callable[[Any], dict[str, Any]]  # model -> Scores
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training: by which method, on how many rows, with which seed. The base itself is of size 0."""

    method: str
    size: int
    seed: int


# (cell, rows, measure): trains the base on the rows as the cell says, and returns what `measure` gives for that model
# (and whatever else shall be kept with it).
Train = Callable[[Cell, Sequence[Row], Measure], dict[str, Any]]


def cells_of(methods: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """All cells, small sets first, so that a sweep that is stopped has whole sizes.

    Raises:
        ValueError: sizes that don't rise from at least 1.
    """
    if not sizes or sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
        raise ValueError(f"sizes must be rising numbers from 1, as in 8, 32, 128; got {list(sizes)}")
    return [Cell(method, size, seed) for size in sizes for seed in seeds for method in methods]


def nested(rows: Sequence[Row], size: int, seed: int) -> list[Row]:
    """The first `size` rows of one shuffle: those of a smaller size are among them, whatever the method.

    Raises:
        ValueError: fewer rows than that.
    """
    if size > len(rows):
        raise ValueError(f"a training set of {size} rows needs as many; there are {len(rows)}")
    order = list(range(len(rows)))
    random.Random(f"nested {seed}").shuffle(order)
    return [rows[i] for i in order[:size]]


def measure(
    model: Any,
    tokenizer: Any,
    held_out: Sequence[Row],
    questions: Sequence[Row],
    texts: Sequence[str],
    *,
    render: Render | None = None,
    batch_size: int = 8,
    window: int = 1024,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What the model knows of the task and of everything else, per item.

    Args:
        held_out: `{"question", "answer"}` rows of the task.
        questions: multiple-choice rows of general knowledge.
        texts: general prose.

    Returns:
        `answers` and `prose`: `nll` (nats, summed) and `tokens` of each item; `knowledge`: `correct` of each question.

    Raises:
        ValueError: as the scores in `lfu.evaluation.score`.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    answers = answer_nll(model, tokenizer, held_out, render=render, **options)
    knowledge = multiple_choice(model, tokenizer, questions, **options)
    prose = perplexity(model, tokenizer, texts, window=window, **options)
    return {"answers": asdict(answers), "knowledge": {"correct": knowledge.correct}, "prose": asdict(prose)}


# --- many trainings ------------------------------------------------------------------------------------------------


class Kept:
    """Finished cells in a folder, one JSON file each, under a key of everything that decided them.

    Args:
        folder: made when the first cell is kept.
        settings: JSON-ready; a cell that was measured under other settings is not found.
        by_method: further settings that concern the cells of one method alone.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], by_method: Mapping[str, Any] | None = None):
        self.folder, self.settings, self.by_method = folder, settings, by_method or {}

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """What was kept; None if there is nothing, or nothing readable."""
        try:
            found = json.loads(self._file(cell).read_text(encoding="utf-8"))
            return found["scores"] if found["key"] == self._key(cell) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, cell: Cell, scores: Mapping[str, Any]) -> None:
        """Keeps a finished cell, whole or not at all.

        Raises:
            OSError: the folder can't be made or written.
        """
        write_text(self._file(cell), dump_json({"key": self._key(cell), "cell": asdict(cell), "scores": scores}))

    def _key(self, cell: Cell) -> str:
        text = json.dumps([self.settings, self.by_method.get(cell.method), asdict(cell)], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _file(self, cell: Cell) -> Path:
        return self.folder / f"{cell.method}-{cell.size}-seed{cell.seed}-{self._key(cell)[:12]}.json"


def sweep(
    cells: Sequence[Cell], rows: Sequence[Row], *, train: Train, measure: Measure, kept: Kept | None = None
) -> Iterator[tuple[Cell, dict[str, Any], bool]]:
    """Trains and measures cell by cell; what was kept is not done again.

    Yields:
        cell, its scores, and whether they were kept from before.

    Raises:
        ValueError: fewer rows than the largest cell needs, before anything is trained.
    """
    if cells:
        nested(rows, max(cell.size for cell in cells), 0)
    for cell in cells:
        scores = kept.load(cell) if kept else None
        if scores is not None:
            yield cell, scores, True
            continue
        scores = train(cell, nested(rows, cell.size, cell.seed), measure)
        if kept:
            kept.save(cell, scores)
        yield cell, scores, False


# --- what it says --------------------------------------------------------------------------------------------------


def summarise(base: Scores, found: Mapping[Cell, Scores], *, seed: int = 0) -> list[dict[str, Any]]:
    """Per method and size: each metric with its interval over the items, and its change against the base.

    Scores are averaged over the seeds item by item first, so the interval is one over items; how far apart the seeds
    are stands beside it. Metrics: `answers`, nats a token; `knowledge`, share of right answers; `prose`, nats a token
    (the logarithm of the perplexity).

    Returns:
        JSON-ready rows: `method`, `size`, `seeds`, and for each metric `value` and `change` (`Interval`s as mappings),
        `by_seed` (one mean a seed), and `against`: the paired difference to the first method at that size, None for
        that method itself.

    Raises:
        ValueError: cells that were not scored on the same items; scores that are not finite.
    """
    groups: dict[tuple[str, int], list[Scores]] = {}
    for cell, scores in found.items():
        groups.setdefault((cell.method, cell.size), []).append(scores)
    first = next(iter(groups), ("", 0))[0]
    rows = []
    for (method, size), seeds in groups.items():
        row: dict[str, Any] = {"method": method, "size": size, "seeds": len(seeds)}
        for metric in METRICS:
            items, weights = _over_seeds(seeds, metric)
            before, _ = _over_seeds([base], metric)
            other = None
            if method != first and (first, size) in groups:
                other, _ = _over_seeds(groups[first, size], metric)
            row[metric] = {
                "value": asdict(mean_interval(items, weights, seed=seed)),
                "change": asdict(paired_difference(items, before, weights, seed=seed)),
                "by_seed": [_plain_mean(*_over_seeds([scores], metric)) for scores in seeds],
                "against": asdict(paired_difference(items, other, weights, seed=seed)) if other else None,
            }
        rows.append(row)
    return sorted(rows, key=lambda row: row["size"])  # stable: methods stay in the order in which they were given


def base_values(base: Scores, *, seed: int = 0) -> dict[str, Interval]:
    """Metric -> the untouched model's value, in the unit of `summarise`."""
    return {metric: mean_interval(*_over_seeds([base], metric), seed=seed) for metric in METRICS}


def _over_seeds(seeds: Sequence[Scores], metric: str) -> tuple[list[float], list[float] | None]:
    """(one number per item, the mean over the seeds; weights or None)."""
    per_seed = [_items(scores[metric]) for scores in seeds]
    if len({len(values) for values in per_seed}) > 1:
        raise ValueError(f"{metric}: the trainings were not scored on the same items")
    if not all(math.isfinite(value) for values in per_seed for value in values):
        raise ValueError(f"{metric}: a score is not a finite number: the training diverged; lower its learning rate")
    items = [sum(values) / len(values) for values in zip(*per_seed)]
    weights = [float(t) for t in seeds[0][metric]["tokens"]] if "tokens" in seeds[0][metric] else None
    return items, weights


def _items(one: Mapping[str, list[Any]]) -> list[float]:
    """One number per item: nats a token, or 1 for right and 0 for wrong."""
    if "nll" in one:
        return [nll / tokens for nll, tokens in zip(one["nll"], one["tokens"])]
    return [float(right) for right in one["correct"]]


def _plain_mean(items: Sequence[float], weights: Sequence[float] | None) -> float:
    weights = weights or [1.0] * len(items)
    return sum(v * w for v, w in zip(items, weights)) / sum(weights)
