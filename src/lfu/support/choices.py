"""The settings that are one of a few words, for `LfUConfig` and `LfUStep` alike, and the one way to refuse another."""

from __future__ import annotations

from collections.abc import Collection

CHOICES = {
    "positions": ("predict", "answer"),
    "direction": ("perturbed", "clean"),
    "ascent_batch": ("same", "independent"),
    "on_bad_batch": ("skip", "raise"),
    "ascent_scope": ("global", "local"),
}


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError, naming the setting and what it may be, unless `value` is among the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
