"""The one way to refuse a value that a setting can't have: a word not among the choices, a number out of range."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import field, fields
from typing import Any


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Raises ValueError, naming the setting and what it may be, unless `value` is among the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")


Limit = tuple[str, Callable[[Any], bool]]  # what a value must be, and whether it is


def setting(
    default: Any, help: str, limit: Limit | None = None, *, words: tuple[str, ...] = (), shared: bool = False
) -> Any:
    """A dataclass field with its help and its `limit`, or the `words` it may be. `shared`: not for the step alone."""
    return field(default=default, metadata={"help": help, "limit": limit, "words": words, "shared": shared})


def whole(low: int, off: bool = False) -> Limit:
    """A whole number >= `low`; with `off` 0 is one, too."""
    of_kind = lambda v: isinstance(v, int) and not isinstance(v, bool)
    text = f"{'0 (off) or ' if off else ''}a whole number >= {low}"
    return text, lambda v: of_kind(v) and (v >= low or (off and v == 0))


def number(zero: bool = False, auto: bool = False) -> Limit:
    """A finite number > 0, or >= 0; with `auto` that word is one, too."""
    of_kind = lambda v: isinstance(v, (int, float)) and math.isfinite(v)
    text = f"a finite number {'>=' if zero else '>'} 0{' or ' + repr('auto') if auto else ''}"
    return text, lambda v: (auto and v == "auto") or (of_kind(v) and (v > 0 or (zero and v == 0)))


def optional(limit: Limit) -> Limit:
    """What `limit` allows, or None."""
    return limit[0], lambda v: v is None or limit[1](v)


SHARE: Limit = ("a share > 0 and <= 1 of the rows", lambda v: isinstance(v, (int, float)) and 0 < v <= 1)
BELOW_ONE: Limit = ("a number >= 0 and < 1", lambda v: isinstance(v, (int, float)) and 0 <= v < 1)


def check(settings: Any) -> None:
    """Raises ValueError if a field of a dataclass, made by `setting`, is out of its limit or none of its words."""
    for f in fields(settings):
        if f.metadata["words"]:
            one_of(f.name, getattr(settings, f.name), f.metadata["words"])
        if f.metadata["limit"]:
            check_within(settings, {f.name: f.metadata["limit"]})


def check_within(settings: Any, limits: Mapping[str, Limit]) -> None:
    """Raises ValueError for a field, named in `limits`, that is not what it may be."""
    for name, (text, fits) in limits.items():
        if not fits(value := getattr(settings, name)):
            raise ValueError(f"{name} must be {text}, got {value!r}")


def refuse_unread(settings: Any, unread: Mapping[str, str], settled: Mapping[str, Any] | None = None) -> None:
    """Raises ValueError if a field of a dataclass is set although nothing reads it.

    `unread`: name -> why. `settled`: name -> a second value, beside the default, that counts as not set.
    """
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.name in unread and value not in (None, f.default, (settled or {}).get(f.name)):
            raise ValueError(f"{f.name}={value!r} would do nothing, as {unread[f.name]}: drop it")
