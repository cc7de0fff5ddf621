"""A method's knobs: fields with a default, a line of help and a range, checked whoever sets them."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

BOUNDS = {
    "low": (">=", operator.ge),
    "above": (">", operator.gt),
    "high": ("<=", operator.le),
    "below": ("<", operator.lt),
}


def knob(default: Any, help: str, *, low: float | None = None, above: float | None = None, high: float | None = None,
         below: float | None = None, choices: tuple[str, ...] | None = None, output: bool = False) -> Any:  # fmt: skip
    """A field of a method: its default, one line of help with the source of the default, and its range.

    Args:
        default: its type is the knob's; "auto" takes that word, or a number.
        low: the value is at least this.
        above: the value is above this.
        high: the value is at most this.
        below: the value is below this.
        choices: the words to choose from.
        output: it names a folder that the method writes to, whose content changes no result.
    """
    bounds = {"low": low, "above": above, "high": high, "below": below}
    limits = {"choices": choices} | {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits, "output": output})


def knobs_of(method: Any) -> list[dataclasses.Field]:
    """The knobs of a method, class or instance."""
    return [f for f in dataclasses.fields(method) if "limits" in f.metadata]


def range_of(default: Any, limits: Mapping[str, Any]) -> str:
    """The range of a knob in words, such as `> 0 and <= 1`; empty where anything goes."""
    if limits.get("choices"):
        return f"one of {', '.join(limits['choices'])}"
    words = " and ".join(f"{sign} {limits[name]:g}" for name, (sign, _) in BOUNDS.items() if name in limits)
    return "true or false" if isinstance(default, bool) else f"auto, or {words}" if default == "auto" else words


def refuse_idle(method: Any, idle: str, by: str) -> None:
    """Raises ValueError where the knob `idle` is set, which acts only while `by` is auto, and that is a number."""
    chosen, value = getattr(method, by), getattr(method, idle)
    if chosen != "auto" and value != getattr(type(method), idle):
        raise ValueError(
            f"{method.name}.{idle}={value:g} acts only with {by}=auto, and {by}={chosen:g} is fixed: drop one of them"
        )


def checked_knob(owner: str, f: dataclasses.Field, value: Any) -> Any:
    """`value`, often a text from the command line, as the knob's type.

    Raises ValueError: it is not of that type, or out of range; the message names knob, range and value.
    """
    limits, kind = f.metadata["limits"], type(f.default)
    found, wanted = value, range_of(f.default, limits)
    if limits["choices"]:
        found = value if value in limits["choices"] else None
    elif kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        found = words.get(str(value).lower())
    elif kind in (int, float):
        found, wanted = _number(kind, value, limits), f"a {'whole' if kind is int else 'finite'} number {wanted}"
    elif f.default == "auto":
        found, wanted = value if value == "auto" else _number(float, value, limits), f"{wanted}, finite"
    else:
        return value if value is None else str(value)
    if found is None:
        raise ValueError(f"{owner}.{f.name} must be {wanted.strip()}, got {value!r}")
    return found


def _number(kind: type, value: Any, limits: Mapping[str, Any]) -> float | None:
    """`value` as an int or a float within the limits; None where it is none."""
    try:
        number = kind(value)
        fits = math.isfinite(number) and not isinstance(value, bool) and (kind is float or float(value) == number)
    except (TypeError, ValueError, OverflowError):
        return None
    inside = all(compare(number, limits[name]) for name, (_, compare) in BOUNDS.items() if name in limits)
    return number if fits and inside else None
