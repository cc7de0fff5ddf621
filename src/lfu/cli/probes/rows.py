"""The data that a probe is given: questions and texts from a file, the hub, or the built-in sets."""

from __future__ import annotations

import argparse
from typing import Any

from lfu.support.errors import UserError, one_line

QUESTION_SHAPES = "question and answer, instruction (and input) and output, or question, choices and answer"


def add_data(parser: argparse.ArgumentParser, default: str) -> None:
    """--data and what belongs to it."""
    parser.add_argument("--data", metavar="DATA", help=f"{default}; or a file, a folder, or a hub name")
    parser.add_argument("--data_split", default="test", metavar="SPLIT", help="split of --data (default: test)")
    parser.add_argument("--data_config", metavar="NAME", help="configuration of a hub data set")


def add_texts(parser: argparse.ArgumentParser, more: str = "") -> None:
    """--texts."""
    parser.add_argument(
        "--texts", metavar="FILE", help=f"rows with a column text{more} (default: 40 built-in passages of prose)"
    )


def add_template(parser: argparse.ArgumentParser) -> None:
    """--template, as `lfu train` has it."""
    parser.add_argument(
        "--template", default="auto", choices=["auto", "chat", "alpaca", "none"],
        help="how questions become prompts; auto means chat if the model has a chat template, else alpaca",
    )  # fmt: skip


def choices(given: argparse.Namespace) -> list[dict[str, Any]]:
    """`{"question", "choices", "answer"}` rows of --data; by default the built-in general knowledge.

    Raises:
        UserError: rows that aren't multiple choice.
    """
    from lfu.data.probes import general_knowledge

    if given.data is None:
        return general_knowledge()[: given.limit]
    return _choices(_load(given), given.data)


def questions(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of --data, each `{"question", "answer"}` or multiple choice; by default the built-in word problems.

    Raises:
        UserError: rows of another shape, or without a question or an answer.
    """
    if given.data is None:
        from lfu.data.word_problems import word_problems

        return word_problems("test", min(100, given.limit or 100))
    return question_rows(_load(given), given.data)


def question_rows(dataset: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a loaded data set in the shapes of `questions`.

    Raises:
        UserError: as `questions`.
    """
    columns = set(dataset.column_names)
    if {"question", "choices"} <= columns:
        return _choices(dataset, name)
    pairs = (("question", "answer"), ("instruction", "output"), ("instruction", "response"))
    found = next((pair for pair in pairs if columns.issuperset(pair)), None)
    if found is None:
        raise UserError(f"data {name}: columns {', '.join(dataset.column_names)}; needed are {QUESTION_SHAPES}")
    extra = next((column for column in ("input", "context") if column in columns and found[0] == "instruction"), "")
    return [_pair(row, found, extra, f"data {name}, row {number}") for number, row in enumerate(dataset, start=1)]


def answered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Multiple-choice rows as questions and answers, the answer the text of the right choice; others as they are."""
    return [row | {"answer": row["choices"][row["answer"]]} if "choices" in row else row for row in rows]


def texts(given: argparse.Namespace) -> list[str]:
    """Texts of --texts; by default the built-in prose.

    Raises:
        UserError: no column text, or a row without one.
    """
    from lfu.data.probes import plain_text

    if given.texts is None:
        return [row["text"] for row in plain_text()][: given.limit]
    return texts_of(load_texts(given), given.texts)


def load_texts(given: argparse.Namespace) -> Any:
    """The data set of --texts."""
    from lfu.data.load import load_rows

    return load_rows(given.texts, limit=given.limit)


def texts_of(dataset: Any, name: str) -> list[str]:
    """The column text.

    Raises:
        UserError: as `texts`.
    """
    if "text" not in dataset.column_names:
        raise UserError(f"texts {name}: columns {', '.join(dataset.column_names)}; needed is one called text")
    found = list(dataset["text"])
    for number, text in enumerate(found, start=1):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"texts {name}: row {number} has no text: fill or remove it")
    return found


def _load(given: argparse.Namespace) -> Any:
    from lfu.data.load import load_rows

    return load_rows(given.data, split=given.data_split, config=given.data_config, limit=given.limit)


def _choices(dataset: Any, name: str) -> list[dict[str, Any]]:
    from lfu.evaluation.forgetting import choice_rows

    try:
        return choice_rows(dataset)
    except ValueError as error:
        raise UserError(f"data {name}: {one_line(error)}") from error


def _pair(row: dict[str, Any], columns: tuple[str, str], extra: str, where: str) -> dict[str, Any]:
    question, answer = (str("" if row[column] is None else row[column]).strip() for column in columns)
    if not question or not answer:
        raise UserError(f"{where} has no {'answer' if question else 'question'}: fill or remove it")
    more = str(row.get(extra) or "").strip()
    return {"question": f"{question}\n\n{more}" if more else question, "answer": answer}
