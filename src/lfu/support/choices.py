"""The one way to refuse a word that is not among the choices."""

from __future__ import annotations

from collections.abc import Collection


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError, naming the setting and what it may be, unless `value` is among the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
