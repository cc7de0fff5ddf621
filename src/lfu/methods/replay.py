"""Replay: general data mixed into the training rows, the plainest remedy against forgetting."""

import math
import random
from typing import Any

from datasets import Dataset

from lfu.data.columns import as_dataset
from lfu.methods.method import Method, knob
from lfu.methods.rows import SHAPES, Row, messages_of, shape_of
from lfu.methods.run import Preparation
from lfu.support.errors import UserError
from lfu.support.words import counted


class Replay(Method):
    """`m = share / (1 - share) * n` rows of general data beside the n training rows, drawn by `args.seed`.

    m is the whole number nearest to the equation, and at least 1; `share` counts rows, not tokens. Rows are drawn
    without replacement; where more are wanted than there are, each is taken once before any is taken again. The
    training rows keep their order, and the drawn ones lie evenly among them, for a sampler that does not shuffle.
    """

    name = "replay"
    summary = "a share of general data mixed into the training rows"
    source = "Ibrahim et al. 2024, arXiv 2403.08763 (5 %); Scialom et al. 2022, arXiv 2205.12393 (1 %)"
    protects = "what the general data exercise"
    places = ("mixture",)

    data: str = knob("", "the general data: file, folder, hub name, or word_problems (required)")
    share: float = knob(0.05, "their share of the mixture, in rows (Ibrahim et al.: 0.05)", above=0, high=0.99)
    split: str = knob("train", "split of the general data")
    config: str = knob("", "configuration of a data set on the hub that has several")

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
        template, tell = _template_of(rows[0], shape), lambda line: run.say(f"replay: {self.data}: {line}")
        pool = to_training_rows(pool, template=template, tokenizer=run.tokenizer, tell=tell)
        count = replayed(len(rows), self.share)
        drawn = [_shaped(row, shape, field) for row in pool.select(draw(len(pool), count, run.args.seed))]
        wanted = SHAPES.get(shape, (field,))
        if any(row.get(column) is None for row in drawn for column in wanted):
            raise UserError(
                f"replay: the training rows have the shape {' and '.join(wanted)}, and {self.data} gives "
                f"{' and '.join(pool.column_names)}: bring both into one shape"
            )
        if len({isinstance(row.get("prompt"), list) for row in (rows[0], *drawn)}) > 1:
            raise UserError(
                f"replay: the training rows and {self.data} don't fit into one table: the prompts of one are texts, "
                "and those of the other conversations"
            )
        mixed = as_dataset([*rows, *drawn])  # which keeps what a row lacks apart from what is empty
        rows_drawn = f"{counted(count, 'row')} drawn from the {len(pool):,} of {self.data}"
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


def _template_of(first: Row, shape: str) -> str:
    """The template that the training rows were made with, as far as the first one shows it."""
    if messages_of(first) is not None:
        return "chat"
    return "alpaca" if shape == "prompt" and first["prompt"].endswith("### Response:\n") else "none"


def _shaped(row: Row, shape: str, field: str) -> Row:
    """A general row in the training rows' shape; a conversation can be cut before its last answer, or joined."""
    if shape == "messages" and isinstance(row.get("prompt"), list):
        row["messages"] = row.pop("prompt") + row.pop("completion")
    elif shape == "prompt" and len(row.get("messages") or ()) > 1:
        *row["prompt"], answer = row.pop("messages")
        row["completion"] = [answer]
    elif shape == "text" and "text" in row:
        row[field] = row.pop("text")
    return row
