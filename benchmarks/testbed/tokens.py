"""Rows of the test bed as arrays of tokens: what bases learn, what is fine-tuned on, what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from testbed.skills import OTHERS, SKILLS, TARGET, Row, rows, stream, vocabulary

PAD = 0
TEST_ROWS, OLD_TEST_ROWS = 300, 150  # of the target and its rewording; of each other skill
OLD = 10_000  # streams of old skills that no base model has learned from start at this seed


class Rows(NamedTuple):
    """Right-padded rows: `ids (N, T)` int64, and `answer (N, T)`, true on the tokens that the loss is taken on."""

    ids: np.ndarray
    answer: np.ndarray


@cache
def numbers() -> dict[str, int]:
    """Token -> its number."""
    return {word: i for i, word in enumerate(vocabulary())}


def tokens(some: Sequence[Row], width: int | None = None) -> Rows:
    """The rows as arrays, as wide as the longest unless `width` says."""
    number = numbers()
    made = [([number[w] for w in row.prompt], [number[w] for w in row.answer]) for row in some]
    width = width or max(len(prompt) + len(answer) for prompt, answer in made)
    ids = np.full((len(made), width), PAD, dtype=np.int64)
    answered = np.zeros((len(made), width), dtype=bool)
    for n, (prompt, answer) in enumerate(made):
        end = len(prompt) + len(answer)
        ids[n, :end] = prompt + answer
        answered[n, len(prompt) : end] = True
    return Rows(ids, answered)


def test_sets() -> dict[str, list[Row]]:
    """The rows that every model is scored on: name -> rows, none of them trained on in fine-tuning.

    `target` asks for the fine-tuned skill as in training, `reworded` by its two other commands.
    """
    sets = {"target": rows(TARGET, TEST_ROWS, "test", 0)}
    sets["reworded"] = [*rows(TARGET, TEST_ROWS // 2, "test", 1), *rows(TARGET, TEST_ROWS // 2, "test", 2)]
    for name in OTHERS:
        sets[name] = rows(name, OLD_TEST_ROWS, "test")
    return sets


def training_rows(count: int, seed: int) -> list[Row]:
    """`count` rows of the target skill, all asked for by its first command, none of them in a test set."""
    given = lambda row: row.prompt[len(SKILLS[TARGET].words[0].split()) :]  # without its command
    tested = {given(row) for name in ("target", "reworded") for row in _test_sets()[name]}
    drawn = [row for row in rows(TARGET, 3 * count, f"train {seed}", 0) if given(row) not in tested]
    return drawn[:count]


def old_rows(count: int, seed: int) -> list[Row]:
    """`count` rows of the skills that the bases know, none of them in a test set."""
    tested = {row for test_rows in _test_sets().values() for row in test_rows}
    return list(islice((row for row in stream(OLD + seed) if row not in tested), count))


_test_sets = cache(test_sets)


def lesson(seed: int, count: int, width: int = 15) -> np.ndarray:
    """The first `count` rows that base model `seed` learns from: `(count, 1 + width)` uint8.

    The first column is the length of the prompt: the loss is on what follows it up to the padding.
    """
    number = numbers()
    out = np.zeros((count, 1 + width), dtype=np.uint8)
    for n, row in enumerate(islice(stream(seed), count)):
        words = [*row.prompt, *row.answer]
        out[n, 0] = len(row.prompt)
        out[n, 1 : 1 + len(words)] = [number[w] for w in words]
    return out
