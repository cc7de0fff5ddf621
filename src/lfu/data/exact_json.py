"""JSON as people wrote it: numbers keep their spelling, and an object has each key once."""

import json
import math
from collections.abc import Sequence
from typing import Any

# what programs read, not people
_DATA = ("tools", "tool_calls", "function_call", "chat_template_kwargs", "weight", "train", "training")


class RepeatedKey(ValueError):
    """An object has a key twice, of which JSON readers keep one value and drop the other."""


def read_json(text: str) -> Any:
    """What a JSON text says; numbers are `float`s that know their spelling, for `as_written`.

    Raises ValueError: it is no JSON; RepeatedKey; RecursionError.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_float=_Number)


def as_written(value: Any) -> Any:
    """The value, with a text in place of every number that Python would spell otherwise: 1.50, 1E5, long decimals."""
    if isinstance(value, dict):
        return {key: inner if key in _DATA else as_written(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [*map(as_written, value)]
    if isinstance(value, _Number):
        return value.text if math.isfinite(value) and json.dumps(value) != value.text else float(value)
    return value


def twice(names: Sequence[str]) -> str | None:
    """The first name that is there twice."""
    return next((name for name in names if names.count(name) > 1), None)


class _Number(float):
    """A number that is no integer, with its spelling."""

    def __init__(self, text: str):
        self.text = text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise RepeatedKey(f"an object has the key {twice([name for name, _ in pairs])!r} twice: rename or remove one")
    return found
