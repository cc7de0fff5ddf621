"""Command lines from dataclasses: a field with a help text is a flag, or an argument; and the types of their values."""

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import field, fields
from functools import partial
from typing import Any, NoReturn, TypeVar

from lfu.support.errors import UserError, did_you_mean, one_line
from lfu.support.words import listed

T = TypeVar("T")


def flag(group: str, default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that is a flag, under `group` in the help; `more` as argparse's add_argument takes it."""
    metadata = {"help": help, **({"group": group} if group else {}), **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


option = partial(flag, "")  # a flag under the help's heading "options"


def switch(group: str, help: str) -> Any:
    """A flag without a value: False unless it is given."""
    return flag(group, False, help, action="store_true")


def argument(metavar: str, help: str, **more: Any) -> Any:
    """A field that is given by its place, without a flag."""
    return field(default=None, metadata={"help": help, "metavar": metavar, "place": True, **more})


class Paragraphs(argparse.HelpFormatter):
    """Wraps each paragraph of the description to the terminal's width."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(Paragraphs, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


class LineParser(argparse.ArgumentParser):
    """argparse, but mistakes raise `UserError`, and flags can't be abbreviated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        usual: dict[str, Any] = {"allow_abbrev": False, "formatter_class": Paragraphs}
        super().__init__(*args, **usual | options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (see: {self.prog} --help)")


def read(options: type[T], prog: str, about: str | None, argv: Sequence[str]) -> T:
    """Parses a command's words into `options`, a dataclass of flags; `about`: the help's text. Raises UserError."""
    parser = LineParser(prog=prog, description=about)
    add_flags(parser, options)
    return options(**given_flags(options, parser.parse_args(argv)))


def read_name(prog: str, about: str | None, help: str, argv: Sequence[str]) -> str | None:
    """Parses the words of a command that takes nothing but an optional name."""
    parser = LineParser(prog=prog, description=about)
    parser.add_argument("name", metavar="NAME", nargs="?", help=help)
    return parser.parse_args(argv).name


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds the flags of a dataclass to a parser, in the groups that it has or in new ones.

    The metavar follows from the flag's type. A default that is a number is added to the help.
    """
    groups = {group.title: group for group in parser._action_groups}
    for one in fields(options):
        more = dict(one.metadata)
        if "help" not in more:
            continue
        title = more.pop("group", "options")
        default = one.default_factory() if callable(one.default_factory) else one.default
        if more.pop("place", False):
            parser.add_argument(one.name, **more)
        else:
            if more.get("type") in METAVARS:
                more["metavar"] = METAVARS[more["type"]]
            if isinstance(default, int | float) and not isinstance(default, bool) and "default" not in more["help"]:
                more["help"] += f" (default: {default:g})"
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
            group.add_argument(f"--{one.name.rstrip('_')}", dest=one.name, default=default, **more)


def given_flags(options: type, given: argparse.Namespace) -> dict[str, Any]:
    """Field -> value of those fields that are flags or arguments."""
    return {one.name: getattr(given, one.name) for one in fields(options) if "help" in one.metadata}


def by_name(words: Sequence[str]) -> dict[str, list[str]]:
    """Name of a flag, with underscores -> its words (the flag and its values); the last time it is given counts.

    Words before the first flag are found under the first of them.
    """
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--") or not found:
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            found.pop(name, None)
            found[name] = []
        found[name].append(word)
    return found


def value_of(make: Callable[[str], T], what: str, fits: Callable[[T], Any] = lambda value: True) -> Callable[[str], T]:
    """The type of a flag whose text `make` turns into a value; refused if that raises ValueError or nothing `fits`."""

    def parse(text: str) -> T:
        with suppress(ValueError):
            if fits(found := make(text)):
                return found
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")

    return parse


def _differ(values: Sequence[Any]) -> bool:
    return bool(values) and len(set(values)) == len(values)


at_least_one = value_of(int, "a whole number from 1", lambda number: number >= 1)
not_negative = value_of(int, "a whole number from 0", lambda number: number >= 0)
from_zero = value_of(float, "a finite number from 0", lambda number: 0 <= number < math.inf)
share_of = value_of(float, "a number from 0 to below 1", lambda number: 0 <= number < 1)
yes_or_no = value_of(lambda text: ("false", "true").index(text.lower()) == 1, "true or false")
seeds_of = value_of(  # `3` is 0, 1, 2; `7,8` are those
    lambda text: list(map(int, text.split(",")) if "," in text else range(int(text))),
    "a number of seeds from 1, or different seeds as in 7,8", lambda seeds: _differ(seeds) and min(seeds) >= 0,
)  # fmt: skip
rates_of = value_of(  # as they were written
    listed, "different numbers above 0, as in 1e-4,3e-4",
    lambda rates: _differ([*map(float, rates)]) and all(0 < float(rate) < math.inf for rate in rates),
)  # fmt: skip


def some_of(known: Collection[str], what: str) -> Callable[[str], list[str]]:
    """The type of a list of some of the `known` words; `none` is the empty list."""

    def parse(text: str) -> list[str]:
        names = [] if text.strip() == "none" else listed(text)
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {unknown!r}: use some of {', '.join(known)}, or none.{did_you_mean(unknown, known)}"
            )
        return [name for name in known if name in names]

    return parse


def pairs_of(text: str) -> dict[str, str]:
    """`KEY=VALUE,KEY=VALUE`."""
    pairs = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise argparse.ArgumentTypeError(f"must be KEY=VALUE,KEY=VALUE, got {part.strip()!r}")
        pairs[name] = value
    return pairs


METAVARS = {
    at_least_one: "N", not_negative: "N", seeds_of: "N", rates_of: "LR,LR", share_of: "SHARE", yes_or_no: "true|false",
    pairs_of: "KEY=VALUE,...",
}  # fmt: skip
