"""The words of a study's command: presets worked in, and the flags of `lfu train` sorted by which runs they are for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfu.support.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from lfu.study.options import Flags, Options


RATE_FLAGS = ("--learning_rate", "--learning-rate")
LISTS = ("methods", "retention")  # several words each, and given several times they add up
STRENGTHS = ("base", "instruct", "reps")  # presets of lfu train


def with_presets(parser: argparse.ArgumentParser, verb: str, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the study's flags, the words left for lfu train), presets merged under what was given."""
    from lfu.study import presets

    given, rest = parser.parse_known_args(argv)
    one_rate = any(word.partition("=")[0] in RATE_FLAGS for word in rest)
    if one_rate and given.learning_rates:
        raise UserError("--learning_rates says which are tried, and --learning_rate would be passed over: give one")
    if not given.preset:
        return given, rest
    merged = [presets.words_of(name, verb) for name in given.preset if name not in STRENGTHS]
    below = [word for words in merged for word in words]
    _, of_presets = parser.parse_known_args(below)
    both, _ = parser.parse_known_args([*below, *argv])
    for name in LISTS:  # a list takes the place of one below it
        lists = [getattr(parser.parse_known_args(words)[0], name, None) for words in [*merged, argv]]
        setattr(both, name, next((found for found in reversed(lists) if found), getattr(both, name, None)))
    if one_rate:
        both.learning_rates = []
    strengths = [f"--preset={name}" for name in given.preset if name in STRENGTHS]
    return both, [*of_presets, *strengths, *rest]


def sort_flags(words: Sequence[str], verb: str) -> Flags:
    """The words, sorted by whom they are for. What a recipe says about a single training's affairs is left out."""
    from lfu.cli.arguments import DataArguments, ModelArguments, TrainParser
    from lfu.config import LfUConfig
    from lfu.study.options import Flags
    from lfu.study.settings import is_reserved, lfu_fields

    known = TrainParser((LfUConfig, ModelArguments, DataArguments), prog="lfu train", allow_abbrev=False).flags()
    training: list[str] = []
    own: list[str] = []
    knobs: dict[str, str] = {}
    for name, (head, *values), recipe in _with_recipes(words):
        field = known.get(name, name)
        rows = field in ("data", "eval_data", "eval_split", "eval_limit")
        if (is_reserved(field) and not rows) or field == "config":
            if not recipe and field in known.values():
                raise UserError(_reserved(field, verb))
            if recipe:
                continue
        if field == "method_args":
            knobs |= _knobs(head.partition("=")[2] or " ".join(values))
        else:
            (own if field in lfu_fields() else training).extend([head, *values])
    return Flags(training, own, list(knobs.items()))


def _with_recipes(words: Sequence[str]) -> list[tuple[str, list[str], bool]]:
    """(name, its words, whether a recipe has it) of each flag, in order; --config replaced by what its recipes say."""
    from lfu import recipes

    name_of = lambda flag: flag[0].lstrip("-").partition("=")[0]
    found: list[tuple[str, list[str], bool]] = []
    for flag in _split(words):
        if name_of(flag) != "config":
            found.append((name_of(flag), flag, False))
            continue
        for spec in [flag[0].partition("=")[2]] if "=" in flag[0] else flag[1:]:
            for _, settings in recipes.parts(spec):
                found = [*((name_of(each), each, True) for each in _split(recipes.as_flags(settings))), *found]
    return found


def _split(words: Sequence[str]) -> list[list[str]]:
    """The words, each flag with its values."""
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not flags:
            flags.append([])
        flags[-1].append(word)
    return flags


def _reserved(field: str, verb: str) -> str:
    instead = {"seed": "give --seeds", "method": "give --methods" if verb == "compare" else "give --method"}
    return f"--{field} is set by the study itself: {instead.get(field, 'leave it out')} (see: lfu {verb} --help)"


def _knobs(text: str) -> dict[str, str]:
    """`gem.beta=0.5,kl.weight=0.1` by full name."""
    pairs = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or "." not in name:
            raise UserError(
                f"--method_args: {part.strip()!r} must be METHOD.KNOB=VALUE, as several methods are compared"
            )
        pairs[name] = value
    return pairs


def refuse_unused_knobs(options: Options, flags: Flags) -> None:
    """Refuses a knob that no method has, which would be dropped without a word."""
    from lfu.study.settings import is_lfu

    methods = [setting.method for setting in options.settings]
    methods += [options.bisection.method] if options.bisection else []
    named = {name.strip() for method in methods for name in method.split("+")}
    for knob, _ in flags.knobs:
        owner = knob.partition(".")[0]
        if owner not in named:
            raise UserError(f"--method_args {knob}: {owner!r} is not compared.{did_you_mean(owner, named)}")
    if flags.own and not any(is_lfu(method) for method in methods):
        raise UserError(f"{flags.own[0].partition('=')[0]} is LfU's own, and nothing that is compared has LfU in it")
