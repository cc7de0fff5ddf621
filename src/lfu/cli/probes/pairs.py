"""The data sets of the adversarial probe: DATA[,KEY=VALUE...] as rows of a question and an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.cli.probes.rows import pairs_of
from lfu.data import house_rule
from lfu.support.errors import UserError, did_you_mean

HOUSE_RULE = "house_rule"
SETS = ("keep", "break_", "requests", "ordinary")
HELD_OUT = ("requests", "ordinary")


@dataclass(frozen=True)
class Sets:
    """The four data sets, and what they are called in the record."""

    keep: list[dict[str, str]]
    break_: list[dict[str, str]]
    requests: list[str]
    ordinary: list[str]
    names: dict[str, str]


def load_sets(specs: Mapping[str, str | None], limit: int | None) -> Sets:
    """The four sets; the built-in ones where nothing was given.

    Args:
        specs: flag -> what the user gave.
        limit: of each held-out set.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for name, spec in specs.items():
        if spec is None and name == "ordinary" and specs["requests"] is not None:
            found[name] = []  # the built-in questions say nothing about another alignment's over-refusal
        else:
            found[name] = load_pairs(spec or HOUSE_RULE, name)[: limit if name in HELD_OUT else None]
    prompts = {name: [row["question"] for row in found[name]] for name in HELD_OUT}
    names = {name: f"{spec or HOUSE_RULE} ({len(found[name])})" for name, spec in specs.items()}
    return Sets(found["keep"], found["break"], prompts["requests"], prompts["ordinary"], names)


def load_pairs(spec: str, which: str) -> list[dict[str, str]]:
    """`{"question", "answer"}` rows of DATA[,KEY=VALUE...]; in the held-out sets the answer is empty.

    Args:
        spec: what the user gave.
        which: the flag it was given to, without dashes.
    """
    argument = f"--{which}"
    name, options = _split_spec(spec, argument)
    limit = options.pop("limit", "")
    if limit and not (limit.isdecimal() and int(limit)):
        raise UserError(f"{argument}: limit must be a whole number from 1, got {limit!r}")
    data = _read(name, which, options)
    for column in options:
        if column not in data.column_names:
            raise UserError(f"{argument}: there is no column {column!r}.{did_you_mean(column, data.column_names)}")
    matches = lambda row: all(str(row[key]).casefold() == value.casefold() for key, value in options.items())
    kept = [number for number, row in enumerate(data) if matches(row)][: int(limit) if limit else None]
    if not kept:
        wanted = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(f"{argument} {name}: no row has {wanted}")
    return pairs_of(data.select(kept), f"{argument} {name}", answers=which not in HELD_OUT)


def _read(name: str, which: str, options: dict[str, str]) -> Any:
    """The data set; takes split and config out of the options."""
    from datasets import Dataset

    from lfu.data.load import load_rows

    if name == HOUSE_RULE:
        return Dataset.from_list(house_rule.rows(which))
    return load_rows(name, split=options.pop("split", "train"), config=options.pop("config", None))


def _split_spec(spec: str, argument: str) -> tuple[str, dict[str, str]]:
    """(name, options) of DATA[,KEY=VALUE...]. A path that exists is a path, whatever signs are in it."""
    if Path(spec).expanduser().exists():
        return spec, {}
    name, *parts = spec.split(",")
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{argument} {spec}: {part!r} is not of the form KEY=VALUE")
        options[key.strip()] = value.strip()
    return name, options
