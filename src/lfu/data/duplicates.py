"""Rows that are there twice: within a set, and in training and evaluation both."""

import json
from collections.abc import Iterable, Mapping
from typing import Any


def repeated(rows: Iterable[Mapping[str, Any]]) -> int:
    """How many rows are, word for word, one that came before."""
    texts = [row_text(row) for row in rows]
    return len(texts) - len(set(texts))


def shared(rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> int:
    """How many of `rows` ask what one of `others` asks; where rows have no prompt, are one of them."""
    asked = lambda row: row_text(row.get("prompt", row))
    known = {asked(row) for row in others}
    return sum(asked(row) in known for row in rows)


def row_text(value: Any) -> str:
    """What makes two rows one: their words, in whatever order the columns are."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
