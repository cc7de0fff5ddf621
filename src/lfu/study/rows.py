"""The rows of a study: which are trained on, which choose, and which are looked at once, at the end."""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.data.columns import as_text
from lfu.data.duplicates import repeated, row_text
from lfu.data.probes import general_knowledge, plain_text
from lfu.data.shapes import SYSTEMS, shape_of
from lfu.data.turns import is_learned
from lfu.evaluation.forgetting import choice_rows
from lfu.evaluation.pieces import Asked, last_answer, plain_pair
from lfu.methods.rows import messages_of, template_arguments
from lfu.support.errors import UserError, value_errors_are_the_users
from lfu.support.files import write_bytes

SPLIT_SEED = "lfu study split"  # the same rows for all seeds: runs are compared in pairs
BESIDE = (*SYSTEMS, "tools", "chat_template_kwargs")  # columns
LEAST = 4  # rows of each part: below, a mean says nothing


@dataclass(frozen=True)
class Split:
    """Rows as they were read, as mappings; `said`: what was done to them, in sentences for the report."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    said: list[str]


@dataclass(frozen=True)
class Kept:
    """A set of items that fine-tuning should not make worse."""

    name: str
    kind: str  # `choice` (accuracy), `answer` or `text` (NLL per token)
    rows: list[Any]  # texts, or as `lfu.evaluation.score` takes them


Rows = Sequence[Mapping[str, Any]]
Shape = Callable[[Any], Any]  # a data set -> the same in one of TRL's shapes


def split(
    rows: Rows, validation: Rows | None, test: Rows | None, *, validation_rows: int | None = None,
    test_rows: int | None = None,
) -> Split:  # fmt: skip
    """Training, validation and test rows; what isn't given is split off the training rows at random, by a fixed seed.

    A training row that is also a validation or test row, word for word, is left out of training; a validation row that
    is also a test row is left out, too.

    Args:
        validation_rows, test_rows: how many to split off. Default: a tenth and a fifth, at least 8 and at most 200.

    Raises:
        UserError: too few rows.
    """
    said = []
    # a row that is there twice is held out once
    left = _without({row_text(row): row for row in rows}.values(), [*(validation or ()), *(test or ())])
    share = lambda part: min(200, max(8, len(left) // part))
    wanted = {
        "test": 0 if test is not None else test_rows or share(5),
        "validation": 0 if validation is not None else validation_rows or share(10),
    }
    taken = sum(wanted.values())
    if taken and len(left) - taken < max(LEAST, taken // 2):
        parts = " and ".join(f"{count} for {name}" for name, count in wanted.items() if count)
        beside = " beside those held out" if validation or test else ""
        raise UserError(
            f"--data has {len(left)} different rows{beside}, too few to split off {parts}: give more rows, --eval_data "
            "and --validation_data, or smaller --test_rows and --validation_rows"
        )
    order = list(range(len(left)))
    random.Random(SPLIT_SEED).shuffle(order)
    held = {}
    for name, count in wanted.items():
        held[name], order = [left[i] for i in sorted(order[:count])], order[count:]
        if count:
            said.append(f"{count} of {len(rows)} rows were split off for {name}.")
    test = held["test"] if test is None else test
    validation = held["validation"] if validation is None else validation
    train, chosen = _without(rows, [*validation, *test]), _without(validation, test)
    if again := repeated(rows):
        said.append(f"{again} of {len(rows)} rows are there before, word for word; they stay in training.")
    if dropped := len(rows) - len(train) - sum(wanted.values()):
        said.append(f"{dropped} training rows are left out: the same rows are among those held out.")
    if dropped := len(validation) - len(chosen):
        said.append(f"{dropped} validation rows are left out: the same rows are test rows.")
    for name, part, least in (("training", train, 1), ("validation", chosen, LEAST), ("test", test, LEAST)):
        if len(part) < least:
            raise UserError(f"{len(part)} {name} rows are left: give more data (at least {least} are needed)")
    return Split(train, chosen, [*map(dict, test)], said)


def retention(name: str, dataset: Any, where: str, shape: Shape) -> Kept:
    """The rows of a file that the model should stay good at. Raises UserError: of no known shape, or no answers."""
    with value_errors_are_the_users(f"--retention {where}"):
        if {"question", "choices"} <= set(dataset.column_names):
            return Kept(name, "choice", choice_rows(dataset))
        rows = shape(dataset)
    if rows.column_names == ["text"]:
        return Kept(name, "text", list(rows["text"]))
    return Kept(name, "answer", list(rows))


def built_in(limit: int | None) -> list[Kept]:
    """General knowledge and prose, as shipped."""
    return [
        Kept("knowledge", "choice", general_knowledge()[:limit]),
        Kept("prose", "text", [row["text"] for row in plain_text()][:limit]),
    ]


def chooses(items: int) -> list[bool]:
    """Which items of a retention set help to choose a setting: every third. The others are what is reported."""
    return [place % 3 == 0 for place in range(items)]


def pair_of(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, str] | Asked:
    """Prompt and answer of a row in one of TRL's shapes, as the trainer would write them; of several answers the last
    that is learned.

    Raises ValueError: a chat template that doesn't keep the prompt in front of the answer.
    """
    if (turns := messages_of(row)) is not None:
        last = max(place for place, turn in enumerate(turns) if is_learned(turn))
        return last_answer(tokenizer, turns[: last + 1], template_arguments(row))
    return plain_pair(tokenizer, row["prompt"], row["completion"])


def questions(rows: Rows) -> list[dict[str, Any]] | None:
    """Raw rows as `{"question", "answer"}`, or multiple choice, to be put in other words; None where they can't be.

    What stands beside a question in training goes with it: `BESIDE`.
    """
    columns = {column: None for row in rows for column in row}
    beside = [{name: row[name] for name in BESIDE if row.get(name)} for row in rows]
    if {"question", "choices"} <= {*columns}:
        return [made | more for made, more in zip(choice_rows(rows), beside)]
    shape = shape_of([*map(dict, rows)], [*columns], "text")
    found = [_question_of(shape.read(dict(row))) for row in rows]
    return None if None in found else [made | more for made, more in zip(found, beside)]  # type: ignore[operator]


def _question_of(read: Mapping[str, Any]) -> dict[str, Any] | None:
    """A conversation of one question and its answer; None for any other."""
    if (turns := messages_of(read)) is None:
        return None
    head = {"system": turns[0]["content"]} if turns[0]["role"] == "system" else {}
    if [turn["role"] for turn in turns[len(head) :]] != ["user", "assistant"]:
        return None
    asked = "\n\n".join(filter(None, (turns[-2]["content"], read.get("input"))))
    return {"question": asked, "answer": turns[-1]["content"]} | head


def trained_on(rows: Rows, train: Rows) -> int:
    """How many of the rows are training rows, word for word."""
    return len(rows) - len(_without(rows, train))


def write_rows(rows: Rows, path: Path) -> None:
    """As JSON lines, for `lfu train --data`; half a surrogate pair, which UTF-8 can't hold, as its escape."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=as_text) + "\n" for row in rows)
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def _without(rows: Iterable[Mapping[str, Any]], others: Rows) -> list[dict[str, Any]]:
    known = {row_text(row) for row in others}
    return [dict(row) for row in rows if row_text(row) not in known]
