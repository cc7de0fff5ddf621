"""Every method under one switch: `LfUConfig(method="gem")`, `"lfu+neftune"`.

To add one, write a file with a `Method` of your own; there is nothing else to edit (see `registry.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from lfu.methods.method import PLACES, Method, checked_knob, knobs_of
from lfu.methods.registry import REGISTRY, method_class, unknown_method
from lfu.support.choices import one_of
from lfu.support.errors import did_you_mean

__all__ = ["REGISTRY", "method_class", "methods_of", "unknown_method", "why_not_together", "written_out"]


def methods_of(spec: str, method_args: str | Mapping[str, Any] | None = None) -> list[Method]:
    """The methods that `spec` names, with their knobs set.

    Args:
        spec: one name, or several joined by `+`: `"lfu+neftune"`.
        method_args: `"gem.beta=0.5,kl.weight=0.1"`, or a mapping or JSON object of the same; the name in front of the
            dot may be left out where only one of the methods has such a knob.

    Raises:
        ValueError: an unknown method or knob, a value out of range, methods that can't be combined (with the reason).
    """
    names = [name.strip() for name in str(spec).split("+")]
    classes = {name: method_class(name) for name in names}
    if len(classes) < len(names):
        raise ValueError(f"method={spec!r} names {next(n for n in names if names.count(n) > 1)!r} twice")
    for one, two in combinations(classes.values(), 2):
        if reason := why_not_together(one, two):
            raise ValueError(f"method={spec!r}: {one.name} and {two.name} can't be combined: {reason}")
    given = _knobs_given(classes, method_args)
    methods = [cls(**given[name]) for name, cls in classes.items()]
    return sorted(methods, key=_order)


def why_not_together(one: type[Method], two: type[Method]) -> str | None:
    """The reason why two methods can't be combined; None where they can."""
    for a, b in ((one, two), (two, one)):
        if b.name in a.never_with:
            return a.never_with[b.name]
    shared = [place for place in one.places if place in two.places and place != "penalty"]
    return f"of each, {PLACES[shared[0]]}, and only one can" if shared else None


def written_out(methods: list[Method]) -> str:
    """All knobs of all methods as `method_args` takes them: what a record should hold."""
    values = {f"{m.name}.{f.name}": getattr(m, f.name) for m in methods for f in knobs_of(m)}
    plain = not any("," in str(value) for value in values.values())
    return ",".join(f"{key}={value}" for key, value in values.items()) if plain else json.dumps(values)


def _order(method: Method) -> int:
    """A replaced loss comes before what is added to it; otherwise as places are listed."""
    places = list(PLACES)
    return min((places.index(place) for place in method.places), default=0)


def _knobs_given(
    classes: Mapping[str, type[Method]], method_args: str | Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    pairs = _pairs(method_args)
    given: dict[str, dict[str, Any]] = {name: {} for name in classes}
    for key, value in pairs.items():
        owner, _, short = key.rpartition(".")
        if owner:
            one_of("the method in method_args", owner, classes)
        owners = [name for name in ([owner] if owner else classes) if short in _names(classes[name])]
        if not owners:
            known = [f"{name}.{k}" for name, cls in classes.items() for k in _names(cls)]
            listed = f"knobs here: {', '.join(known)}" if known else f"{'+'.join(classes)} has no knobs"
            raise ValueError(f"method_args: unknown knob {key!r}; {listed}.{did_you_mean(key, known)}")
        if len(owners) > 1:
            raise ValueError(f"method_args: {key!r} could be {' or '.join(f'{o}.{short}' for o in owners)}: say which")
        f = next(f for f in knobs_of(classes[owners[0]]) if f.name == short)
        given[owners[0]][short] = checked_knob(owners[0], f, value)
    return given


def _names(cls: type[Method]) -> list[str]:
    return [f.name for f in knobs_of(cls)]


def _pairs(method_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if not method_args:
        return {}
    if isinstance(method_args, Mapping):
        return {str(key): value for key, value in method_args.items()}
    if str(method_args).lstrip().startswith("{"):
        return _pairs_of_json(str(method_args))
    pairs = {}
    for part in str(method_args).split(","):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"method_args: {part!r} is not of the form knob=value")
        pairs[key.strip()] = value.strip()
    return pairs


def _pairs_of_json(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"method_args: {text!r} is not a JSON object ({error})") from error
