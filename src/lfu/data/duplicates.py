"""Rows that are there twice: within a set, and in training and evaluation both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def repeated(rows: Iterable[Mapping[str, Any]]) -> int:
    """How many rows are, word for word, one that came before."""
    seen: set[str] = set()
    count = 0
    for row in rows:
        text = _text(row)
        count += text in seen
        seen.add(text)
    return count


def shared(rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> int:
    """How many of `rows` ask what one of `others` asks; where rows have no prompt, are one of them."""
    known = {_asked(row) for row in others}
    return sum(_asked(row) in known for row in rows)


def _asked(row: Mapping[str, Any]) -> str:
    return _text(row["prompt"]) if "prompt" in row else _text(row)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
