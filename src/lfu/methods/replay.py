"""Replay: general data mixed into the training rows, the plainest remedy against forgetting."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset

from lfu.data.columns import as_dataset
from lfu.methods.method import Method, Preparation, knob
from lfu.methods.rows import SHAPES, shape_of
from lfu.support.errors import UserError


@dataclass
class Replay(Method):
    """`m = share / (1 - share) * n` rows of general data beside the n training rows, drawn by `args.seed`.

    `share` is a share of the resulting mixture and counts rows, not tokens: m is the whole number nearest to the
    equation, and at least 1. Rows are drawn without replacement; where more are wanted than there are, each is taken
    once before any is taken again. The training rows keep their order, and the drawn ones lie evenly among them, for a
    sampler that does not shuffle.

    Ibrahim et al. replay 5 % of the tokens in continual pre-training where old and new data are alike, and more where
    they are not; Scialom et al. find 1 % of each earlier task's rows enough in instruction tuning.
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "a share of general data mixed into the training rows"
    source: ClassVar[str] = "Ibrahim et al. 2024, arXiv 2403.08763 (5 %); Scialom et al. 2022, arXiv 2205.12393 (1 %)"
    protects: ClassVar[str] = "what the general data exercise"
    places: ClassVar[tuple[str, ...]] = ("mixture",)

    data: str = knob("", "the general data: file, folder, hub name, or word_problems (required)")
    share: float = knob(0.05, "their share of the mixture, in rows (Ibrahim et al.: 0.05)", above=0, high=0.99)
    split: str = knob("train", "split of the general data")
    config: str = knob("", "configuration of a hub data set that has several")

    def configure(self, args: Any) -> None:
        if not self.data:
            raise ValueError(
                "method='replay' needs the general data to mix in: give --method_args replay.data=FILE "
                "(a json, jsonl, csv or parquet file, a folder of them, or a name on the hub)"
            )

    def rows(self, rows: Dataset, run: Preparation) -> Dataset:
        from lfu.data.load import load_rows
        from lfu.data.templates import to_training_rows

        field = run.args.dataset_text_field
        shape = shape_of(rows, self.name, field)
        pool = load_rows(self.data, split=self.split, config=self.config or None)
        pool = to_training_rows(pool, template=_template_of(rows, shape), tokenizer=run.tokenizer)
        pool = _in_shape(pool, shape, field, self.data)
        count = replayed(len(rows), self.share)
        drawn = draw(len(pool), count, run.args.seed)
        mixed = _one_table(rows, pool.select(drawn), self.data)
        rows_drawn = f"{count:,} row{'s' * (count > 1)} drawn from the {len(pool):,} of {self.data}"
        again = f", each {count / len(pool):.1f} times" if count > len(pool) else ""
        share = 100 * count / len(mixed)
        run.say(f"replay: {rows_drawn}{again}, mixed into {len(rows):,} training rows ({share:.1f} % of the mixture)")
        return mixed.select(spread(len(rows), count))


def replayed(rows: int, share: float) -> int:
    """How many rows to mix into `rows` so that they are `share` of the mixture: the nearest number, at least 1."""
    return max(1, math.floor(rows * share / (1 - share) + 0.5))


def draw(size: int, count: int, seed: int) -> list[int]:
    """`count` numbers below `size`, each once before any comes again; the same for the same seed, in any process."""
    rng = random.Random(f"replay {seed}")  # a text: seeded alike in every process
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += rng.sample(range(size), min(size, count - len(drawn)))
    return drawn


def spread(rows: int, extra: int) -> list[int]:
    """The order of `rows + extra` rows in which the last `extra` lie evenly among the first `rows`."""
    own = [(float(number), number) for number in range(rows)]
    # the i-th of m lies in the middle of the i-th of m equal parts
    drawn = [((2 * i + 1) * rows / (2 * extra) - 0.5, rows + i) for i in range(extra)]
    return [number for _, number in sorted(own + drawn)]


def _template_of(rows: Dataset, shape: str) -> str:
    """The template that the training rows were made with, as far as they show it."""
    if shape == "text":
        return "none"
    first = rows[0][SHAPES[shape][0]]
    if isinstance(first, list):
        return "chat"
    return "alpaca" if first.endswith("### Response:\n") else "none"


def _in_shape(pool: Dataset, shape: str, field: str, name: str) -> Dataset:
    """The general rows in the training rows' shape; a conversation can be cut before its last answer, or joined."""
    columns = set(pool.column_names)
    if shape == "messages" and columns >= {"prompt", "completion"} and isinstance(pool[0]["prompt"], list):
        return _replace(pool, [{"messages": row["prompt"] + row["completion"]} for row in pool])
    if shape == "prompt" and "messages" in columns and all(len(row["messages"]) > 1 for row in pool):
        return _replace(pool, [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in pool])
    if shape == "text" and "text" in columns and field not in columns:
        return pool.rename_column("text", field)
    wanted = SHAPES.get(shape, (field,))
    if not columns.issuperset(wanted):
        raise UserError(
            f"replay: the training rows have the shape {' and '.join(wanted)}, and {name} gives "
            f"{' and '.join(pool.column_names)}: bring both into one shape"
        )
    return pool


def _replace(pool: Dataset, rows: list[dict[str, Any]]) -> Dataset:
    """`rows` with what else the pool has: tools and the like."""
    kept = [column for column in pool.column_names if column not in ("prompt", "completion", "messages")]
    return as_dataset([row | {column: old[column] for column in kept} for row, old in zip(rows, pool)])


def _one_table(rows: Dataset, drawn: Dataset, name: str) -> Dataset:
    kinds = {isinstance(one[0].get("prompt"), list) for one in (rows, drawn)}
    if len(kinds) > 1:
        raise UserError(
            f"replay: the training rows and {name} don't fit into one table: the prompts of one are texts, and those "
            "of the other conversations"
        )
    return as_dataset([*rows, *drawn])  # which keeps what a row lacks apart from what is empty
