"""The data sets of the adversarial probe: DATA[,KEY=VALUE...] as rows of a question and an answer."""

from collections.abc import Mapping
from pathlib import Path

from lfu.cli.probes.rows import Row, pairs_of
from lfu.data import probes
from lfu.support.errors import UserError, did_you_mean

HOUSE_RULE = "house_rule"
HELD_OUT = ("requests", "ordinary")


def load_sets(specs: Mapping[str, str | None], limit: int | None) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """(the four sets by flag, built-in where none is given; their names for the record). `limit`: of held-out ones."""
    found: dict[str, list[Row]] = {}
    for name, spec in specs.items():
        if spec is None and name == "ordinary" and specs["requests"] is not None:
            found[name] = []  # the built-in questions say nothing about another alignment's over-refusal
        else:
            found[name] = load_pairs(spec or HOUSE_RULE, name)[: limit if name in HELD_OUT else None]
    return found, {name: f"{spec or HOUSE_RULE} ({len(found[name])})" for name, spec in specs.items()}


def load_pairs(spec: str, which: str) -> list[Row]:
    """`{"question", "answer"}` rows of the DATA[,KEY=VALUE...] of flag `which`; of held-out sets without answers."""
    from datasets import Dataset

    from lfu.data.load import load_rows

    argument = f"--{which}"
    name, options = _split_spec(spec, argument)
    limit = options.pop("limit", "")
    if limit and not (limit.isdecimal() and int(limit)):
        raise UserError(f"{argument}: limit must be a whole number from 1, got {limit!r}")
    if name == HOUSE_RULE:
        data = Dataset.from_list(probes.house_rule(which))
    else:
        data = load_rows(name, split=options.pop("split", "train"), config=options.pop("config", None))
    for column in options:
        if column not in data.column_names:
            raise UserError(f"{argument}: there is no column {column!r}.{did_you_mean(column, data.column_names)}")
    matches = lambda row: all(str(row[key]).casefold() == value.casefold() for key, value in options.items())
    kept = [number for number, row in enumerate(data) if matches(row)][: int(limit) if limit else None]
    if not kept:
        wanted = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(f"{argument} {name}: no row has {wanted}")
    return pairs_of(data.select(kept), f"{argument} {name}", answers=which not in HELD_OUT)


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
