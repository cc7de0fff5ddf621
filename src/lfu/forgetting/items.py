"""What is asked again and again: built-in questions and prose, and files of the user's own."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.data.files import file_rows
from lfu.data.probes import general_knowledge, plain_text
from lfu.evaluation.forgetting import choice_rows
from lfu.support.errors import UserError
from lfu.support.files import not_utf8

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
    """Rows with `question`, `choices` and `answer`, or with `text`; of a `.txt` file the paragraphs."""
    if path.stem in RESERVED:
        raise ValueError(f"{path}: the name {path.stem!r} is taken by a built-in measure: rename the file")
    try:
        if path.suffix == ".txt":
            parts = path.read_text(encoding="utf-8-sig").split("\n\n")
            rows = [{"text": part.strip()} for part in parts if part.strip()]
        else:
            rows = list(file_rows(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {not_utf8(path)}") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    except UserError as error:
        raise ValueError(str(error)) from error
    if not rows:
        raise ValueError(f"{path} is empty: give rows with a text, or with question, choices and answer")
    if all("choices" in row for row in rows):
        try:
            return ItemSet(path.stem, True, choice_rows(rows))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row.get("text"), str) and row["text"].strip()):
            raise ValueError(
                f"{path}, row {number}: give all rows a 'text', or all rows 'question', 'choices' and 'answer'"
            )
    return ItemSet(path.stem, False, [row["text"] for row in rows])
