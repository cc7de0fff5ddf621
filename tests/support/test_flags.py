"""Flags made of a dataclass's fields, and the types of their values."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from lfu.support import flags
from lfu.support.flags import add_flags, flag, given_flags


@dataclass
class Options:
    """Two flags and a field that is none."""

    place: str = "here"
    count: int = flag("numbers", 3, "how many", type=flags.at_least_one, metavar="N")
    names: list[str] = flag("names", ["a"], "which", nargs="+", action="extend")


def parsed(*words: str) -> dict:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, Options)
    return given_flags(Options, parser.parse_args(words))


def test_flags_have_the_fields_defaults_and_types():
    assert parsed() == {"count": 3, "names": ["a"]}
    assert parsed("--count", "5")["count"] == 5
    assert parsed("--names", "b", "--names", "c")["names"] == ["a", "b", "c"]
    assert parsed() == {"count": 3, "names": ["a"]}  # no default was changed by the run before
    assert Options(**parsed()).names == Options().names


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (flags.at_least_one, "1", 1), (flags.not_negative, "0", 0), (flags.yes_or_no, "True", True),
        (flags.share_of, "0.25", 0.25), (flags.seeds_of, "3", [0, 1, 2]), (flags.seeds_of, "7,8", [7, 8]),
        (flags.rates_of, "1e-4, 3e-4", ["1e-4", "3e-4"]), (flags.pairs_of, "a=1,b=x y", {"a": "1", "b": "x y"}),
        (flags.some_of(("a", "b"), "word"), "b,a", ["a", "b"]), (flags.some_of(("a", "b"), "word"), "none", []),
    ],
)  # fmt: skip
def test_values(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (flags.at_least_one, "0"), (flags.at_least_one, "1.5"), (flags.not_negative, "-1"), (flags.yes_or_no, "yes"),
        (flags.share_of, "1"), (flags.share_of, "nan"), (flags.share_of, "x"), (flags.seeds_of, "0"),
        (flags.seeds_of, "1,1"), (flags.seeds_of, "-1,2"), (flags.rates_of, "0"), (flags.rates_of, "inf"),
        (flags.rates_of, "1,1.0"), (flags.rates_of, ""), (flags.pairs_of, "a"), (flags.pairs_of, "a="),
        (flags.some_of(("alpha", "beta"), "word"), "alhpa"),
    ],
)  # fmt: skip
def test_what_is_no_value(kind, text):
    with pytest.raises(argparse.ArgumentTypeError):
        kind(text)
