"""Every method under one switch: `LfUConfig(method="gem")`, `"lfu+neftune"`.

To add one, write a file with a `Method` of your own; there is nothing else to edit (see `registry.py`).
"""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from lfu.methods.knobs import checked_knob, knobs_of
from lfu.methods.method import PLACES, Method
from lfu.methods.registry import REGISTRY, method_class, unknown_method
from lfu.support.choices import one_of
from lfu.support.errors import did_you_mean

__all__ = [
    "REGISTRY", "check_adapter", "method_class", "methods_of", "unknown_method", "why_not_together", "written_out",
]  # fmt: skip


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
    given: dict[str, dict[str, Any]] = {name: {} for name in classes}
    known = {(name, f.name): f for name, cls in classes.items() for f in knobs_of(cls)}
    for key, value in knob_pairs(method_args).items():
        owner, _, knob = key.rpartition(".")
        if owner:
            one_of("method in method_args", owner, classes)
        fitting = [name for name, known_knob in known if known_knob == knob and owner in ("", name)]
        if not fitting:
            all_knobs = [".".join(pair) for pair in known]
            listed = f"settings here: {', '.join(all_knobs)}" if known else f"{'+'.join(classes)} has no settings"
            raise ValueError(f"method_args: unknown setting {key!r}; {listed}.{did_you_mean(key, all_knobs)}")
        if len(fitting) > 1:
            raise ValueError(f"method_args: {key!r} could be {' or '.join(f'{o}.{knob}' for o in fitting)}: say which")
        given[fitting[0]][knob] = checked_knob(fitting[0], known[fitting[0], knob], value)
    return sorted((cls(**given[name]) for name, cls in classes.items()), key=_order)


def check_adapter(methods: Sequence[Method], config: Any, *, further: bool = False) -> None:
    """Raises ValueError for a method that can't work with the PEFT `config`; see `Method.check_adapter`.

    A method that decides how the adapter starts is asked alone: the others get another adapter from it.
    """
    for method in [method for method in methods if "adapter" in method.places] or methods:
        method.check_adapter(config, further=further)


def why_not_together(one: type[Method], two: type[Method]) -> str | None:
    """The reason why two methods can't be combined; None where they can."""
    for a, b in ((one, two), (two, one)):
        if b.name in a.never_with:
            return a.never_with[b.name]
    shared = [place for place in one.places if place in two.places and place != "penalty"]
    return f"of each, {PLACES[shared[0]]}, and only one can" if shared else None


def written_out(methods: list[Method]) -> str:
    """All knobs of all methods as `method_args` takes them: what a record should hold."""
    return as_method_args({f"{m.name}.{f.name}": getattr(m, f.name) for m in methods for f in knobs_of(m)})


def as_method_args(values: Mapping[str, Any]) -> str:
    """Knobs and their values as one text."""
    plain = not any("," in str(value) for value in values.values())
    return ",".join(f"{key}={value}" for key, value in values.items()) if plain else json.dumps(values)


def _order(method: Method) -> int:
    """A replaced loss comes before what is added to it; otherwise as places are listed."""
    places = list(PLACES)
    return min((places.index(place) for place in method.places), default=0)


def knob_pairs(method_args: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Knob -> value, as it was given."""
    if isinstance(method_args, Mapping):
        return method_args
    text = str(method_args or "").strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"method_args: {text!r} is not a JSON object ({error})") from error
    parts = [part.partition("=") for part in text.split(",")] if text else []
    for key, equals, value in parts:
        if not equals or not key.strip():
            raise ValueError(f"method_args: {key + equals + value!r} is not of the form setting=value")
    return {key.strip(): value.strip() for key, _, value in parts}
