"""The rows of a study: which are trained on, which choose, and which are looked at once, at the end."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.data.columns import as_dataset
from lfu.data.probes import general_knowledge, plain_text
from lfu.data.templates import to_training_rows
from lfu.evaluation.forgetting import choice_rows
from lfu.evaluation.pieces import last_answer
from lfu.methods.rows import messages_of, template_arguments
from lfu.support.errors import UserError, one_line
from lfu.support.files import write_text

SPLIT_SEED = "lfu study split"  # the same rows for all seeds: runs are compared in pairs
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
    """A set of items that fine-tuning should not make worse.

    Attributes:
        kind: `choice` (accuracy), `answer` or `text` (NLL per token).
        rows: as `lfu.evaluation.score` takes them; texts for `text`, TRL's shapes for `answer`.
    """

    name: str
    kind: str
    rows: list[Any]


Rows = Sequence[Mapping[str, Any]]


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
    left = _without({_text(row): row for row in rows}.values(), [*(validation or ()), *(test or ())])
    wanted = {
        "test": 0 if test is not None else test_rows or _share(len(left), 5),
        "validation": 0 if validation is not None else validation_rows or _share(len(left), 10),
    }
    _need_enough(len(left), wanted, " beside those held out" if validation or test else "")
    order = list(range(len(left)))
    random.Random(SPLIT_SEED).shuffle(order)
    parts = {}
    for name, count in wanted.items():
        taken, order = sorted(order[:count]), order[count:]
        parts[name] = [left[i] for i in taken]
        if count:
            said.append(f"{count} of {len(rows)} rows were split off for {name}.")
    test = _copied(parts["test"] if test is None else test)
    validation = _copied(parts["validation"] if validation is None else validation)
    train, chosen = _without(rows, [*validation, *test]), _without(validation, test)
    if again := len(rows) - len({_text(row) for row in rows}):
        said.append(f"{again} of {len(rows)} rows are there before, word for word; they stay in training.")
    if dropped := len(rows) - len(train) - sum(wanted.values()):
        said.append(f"{dropped} training rows are left out: the same rows are among those held out.")
    if dropped := len(validation) - len(chosen):
        said.append(f"{dropped} validation rows are left out: the same rows are test rows.")
    for name, part, least in (("training", train, 1), ("validation", chosen, LEAST), ("test", test, LEAST)):
        if len(part) < least:
            raise UserError(f"{len(part)} {name} rows are left: give more data (at least {least} are needed)")
    return Split(train, chosen, test, said)


def retention(name: str, dataset: Any, where: str, *, template: str, system: str | None, tokenizer: Any) -> Kept:
    """The rows of a file that the model should stay good at.

    Args:
        dataset: as `load_rows` gives it: multiple choice, texts, or anything that can be trained on.

    Raises:
        UserError: rows of no known shape, or without answers.
    """
    try:
        if {"question", "choices"} <= set(dataset.column_names):
            return Kept(name, "choice", choice_rows(dataset))
        rows = to_training_rows(dataset, template=template, tokenizer=tokenizer, system=system)
    except (UserError, ValueError) as error:
        raise UserError(f"--retention {where}: {one_line(error)}") from error
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


# --- rows as they are scored ---------------------------------------------------------------------------------------


def pair_of(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, answer) of a row in one of TRL's shapes, as the trainer would write them; of several turns the last.

    Raises:
        ValueError: a chat template that doesn't keep the prompt in front of the answer.
    """
    if (turns := messages_of(row)) is not None:
        return last_answer(tokenizer, turns, template_arguments(row))
    # what the tokenizer and TRL put round a plain text
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    begin = tokenizer.bos_token if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""
    return begin + row["prompt"], row["completion"] + (tokenizer.eos_token or "")


def questions(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]] | None:
    """Raw rows as `{"question", "answer"}`, or multiple choice, to be put in other words; None where they can't be."""
    columns = {column for row in rows for column in row}
    if {"question", "choices"} <= columns:
        return choice_rows(rows)
    ready = columns >= {"prompt", "completion"} or "messages" in columns
    if not ready and not columns & {"question", "instruction", "conversations"}:
        return None
    if not ready:
        made = to_training_rows(as_dataset(rows), template="none", tokenizer=tokenizer)
        return [{"question": row["prompt"].strip(), "answer": row["completion"]} for row in made]
    found = [_question_of(row) for row in rows]
    return None if None in found else found  # type: ignore[return-value]


def _question_of(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A conversation of one question and its answer; None for any other."""
    turns = row.get("messages") or row["prompt"]
    if not isinstance(turns, list):
        return None
    turns = [turn for turn in [*turns, *(row.get("completion") or [])] if turn["role"] != "system"]
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        return None
    return {"question": turns[0]["content"], "answer": turns[1]["content"]}


def trained_on(rows: Rows, train: Rows) -> int:
    """How many of the rows are training rows, word for word."""
    return len(rows) - len(_without(rows, train))


def write_rows(rows: Rows, path: Path) -> None:
    """As JSON lines, for `lfu train --data`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def _share(rows: int, part: int) -> int:
    return min(200, max(8, rows // part))


def _need_enough(rows: int, wanted: Mapping[str, int], beside: str) -> None:
    taken = sum(wanted.values())
    if taken and rows - taken < max(LEAST, taken // 2):
        parts = " and ".join(f"{count} for {name}" for name, count in wanted.items() if count)
        raise UserError(
            f"--data has {rows} different rows{beside}, too few to split off {parts}: give more rows, --eval_data and "
            "--validation_data, or smaller --test_rows and --validation_rows"
        )


def _copied(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


def _without(rows: Iterable[Mapping[str, Any]], others: Rows) -> list[dict[str, Any]]:
    known = {_text(row) for row in others}
    return _copied(row for row in rows if _text(row) not in known)


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
