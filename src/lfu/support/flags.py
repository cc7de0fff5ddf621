"""Command lines from dataclasses: a field with a help text is a flag, or an argument; and the types of their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import field, fields
from functools import partial
from typing import Any, NoReturn, TypeVar

from lfu.support.errors import UserError, did_you_mean, one_line

T = TypeVar("T")


def flag(group: str, default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that is a flag of its name, listed under `group` in the help.

    Args:
        more: what `argparse`'s add_argument takes beside the default and the help.
    """
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
    """Fills the description to the terminal's width, each paragraph by itself."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(Paragraphs, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


class LineParser(argparse.ArgumentParser):
    """argparse, but a mistake is a `UserError` instead of usage lines and an exit. Flags can't be abbreviated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        usual: dict[str, Any] = {"allow_abbrev": False, "formatter_class": Paragraphs}
        super().__init__(*args, **usual | options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (see: {self.prog} --help)")


def read(options: type[T], prog: str, about: str | None, argv: Sequence[str]) -> T:
    """A command's options from its words.

    Args:
        options: a dataclass whose fields are all made by the functions above.
        about: the text of the help.

    Raises:
        UserError: an unknown flag, or a value that is none of the flag's.
    """
    parser = LineParser(prog=prog, description=about)
    add_flags(parser, options)
    return options(**given_flags(options, parser.parse_args(argv)))


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Adds the flags of a dataclass to a parser, in the groups that it has or in new ones."""
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
            if more.get("type") is yes_or_no:
                more["metavar"] = "true|false"
            group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
            group.add_argument(f"--{one.name.rstrip('_')}", dest=one.name, default=default, **more)


def given_flags(options: type, given: argparse.Namespace) -> dict[str, Any]:
    """Field -> value of those fields that are flags or arguments."""
    return {one.name: getattr(given, one.name) for one in fields(options) if "help" in one.metadata}


# --- types of values -------------------------------------------------------------------------------------------------


def _number(make: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with suppress(ValueError):
            if fits(found := make(text)):
                return found
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")

    return parse


at_least_one = _number(int, lambda number: number >= 1, "a whole number from 1")
not_negative = _number(int, lambda number: number >= 0, "a whole number from 0")
from_zero = _number(float, lambda number: 0 <= number < math.inf, "a finite number from 0")
share_of = _number(float, lambda number: 0 <= number < 1, "a number from 0 to below 1")


def yes_or_no(text: str) -> bool:
    """`true` or `false`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def seeds_of(text: str) -> list[int]:
    """`3` is 0, 1, 2; `7,8` are those."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if "," not in text and found:
        found = list(range(found[0]))
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"must be a number of seeds from 1, or different seeds as in 7,8, got {text!r}"
        )
    return found


def rates_of(text: str) -> list[str]:
    """Learning rates as they were written, all different."""
    rates = [part.strip() for part in text.split(",") if part.strip()]
    try:
        numbers = [float(rate) for rate in rates]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 < rate < math.inf for rate in numbers):
        raise argparse.ArgumentTypeError(f"must be different numbers above 0, as in 1e-4,3e-4, got {text!r}")
    return rates


def some_of(known: Collection[str], what: str) -> Callable[[str], list[str]]:
    """The type of a list of some of the `known` words; `none` is the empty list."""

    def parse(text: str) -> list[str]:
        names = [] if text.strip() == "none" else [part.strip() for part in text.split(",") if part.strip()]
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
