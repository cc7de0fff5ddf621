"""What is asked again and again: built-in questions and prose, and files of the user's own."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.data.probes import general_knowledge, plain_text
from lfu.evaluation.forgetting import choice_rows

QUESTIONS, PROSE, WRITTEN = "questions", "prose", "written"
RESERVED = (QUESTIONS, PROSE, WRITTEN)


@dataclass(frozen=True)
class ItemSet:
    """Items of one kind under one name."""

    name: str  # `questions`, `prose`, or the stem of the user's file
    choice: bool  # multiple-choice rows `{"question", "choices", "answer"}`; otherwise plain texts
    items: list[Any]  # in an order drawn once, so that the first n are a fair sample


def item_sets(files: Iterable[str | Path], seed: int) -> list[ItemSet]:
    """The built-in sets, then one for each file.

    Raises ValueError: a file that can't be read, or whose rows are neither questions nor texts; the message names the
    row.
    """
    sets = [
        ItemSet(QUESTIONS, True, choice_rows(general_knowledge())),
        ItemSet(PROSE, False, [row["text"] for row in plain_text()]),
        *map(_of_file, map(Path, files)),
    ]
    names = [each.name for each in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two sets of items are called {twice[0]!r}: rename one of the files")
    for each in sets:
        random.Random(seed).shuffle(each.items)
    return sets


def _of_file(path: Path) -> ItemSet:
    """`.jsonl` or `.json` rows with `question`, `choices` and `answer`, or with `text`; `.txt`: paragraphs."""
    if path.stem in RESERVED:
        raise ValueError(f"{path}: the name {path.stem!r} is taken by a built-in measure: rename the file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"{path} can't be read: {why}") from error
    if path.suffix == ".txt":
        rows: list[Any] = [{"text": part.strip()} for part in text.split("\n\n") if part.strip()]
    else:
        rows = _json_rows(path, text)
    if not rows:
        raise ValueError(f"{path} is empty: give rows with a text, or with question, choices and answer")
    if all(isinstance(row, Mapping) and "choices" in row for row in rows):
        try:
            return ItemSet(path.stem, True, choice_rows(rows))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, Mapping) and isinstance(row.get("text"), str) and row["text"].strip()):
            raise ValueError(
                f"{path}, row {number}: give all rows a 'text', or all rows 'question', 'choices' and 'answer'"
            )
    return ItemSet(path.stem, False, [row["text"] for row in rows])


def _json_rows(path: Path, text: str) -> list[Any]:
    whole = path.suffix == ".json"
    lines = [(f", line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows: list[Any] = []
    for where, part in [("", text)] if whole else lines:
        try:
            found = json.loads(part)
        except ValueError as error:
            raise ValueError(f"{path}{where} is not valid JSON: {error}") from error
        rows += found if whole and isinstance(found, list) else [found]
    return rows
