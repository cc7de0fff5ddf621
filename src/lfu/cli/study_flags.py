"""The words of a study's command: presets worked in, and the flags of `lfu train` that all its runs are given."""

import argparse
from collections.abc import Sequence
from typing import Any

from lfu import recipes
from lfu.study.options import Options
from lfu.support.errors import UserError, did_you_mean, value_errors_are_the_users
from lfu.support.flags import by_name

STRENGTHS = ("base", "instruct", "reps")  # presets of lfu train
ROWS = ("data", "eval_data", "eval_split", "eval_limit")  # a study reads these as lfu train does


def with_presets(parser: argparse.ArgumentParser, verb: str, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the study's flags, the words left for lfu train), presets merged under what was given."""
    from lfu.study import presets

    given, typed = parser.parse_known_args(argv)[0], by_name(argv)
    if "learning_rate" in typed and given.learning_rates:
        raise UserError("--learning_rates says which are tried, so --learning_rate would do nothing: give one of them")
    replaced = typed.keys() | ({"learning_rates"} if "learning_rate" in typed else set())
    below: dict[str, Any] = {}
    for name in given.preset:
        if name not in STRENGTHS:
            below |= presets.settings_of(name, verb)
    params = [f"--param={name}={','.join(map(str, values))}" for name, values in below.pop("param", {}).items()]
    words = recipes.as_flags({name: value for name, value in below.items() if name not in replaced})
    both, rest = parser.parse_known_args([*words, *params, *argv])
    return both, [*rest, *(f"--preset={name}" for name in given.preset if name in STRENGTHS)]


def flags_of(words: Sequence[str], verb: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(field of `lfu train` -> the words that set it, knob -> value), those of recipes first.

    What a recipe says about a single training is left out.
    """
    from lfu.cli.arguments import make_parser, with_recipes
    from lfu.study.settings import is_reserved

    known = make_parser().flags()
    settings, rest = with_recipes(words, known)
    typed = {known.get(name, name): each for name, each in by_name(rest).items()}
    own = lambda field: is_reserved(field) and field not in ROWS
    for field in typed:
        if own(field) and field in known.values():
            instead = {"seed": "give --seeds", "method": "give --methods" if verb == "compare" else "give --method"}
            how = instead.get(field, "leave it out")
            raise UserError(f"--{field} is set by the study itself: {how} (see: lfu {verb} --help)")
    knobs: dict[str, str] = {}
    of_recipes = {field: recipes.as_flags({field: value}) for field, value in settings.items() if not own(field)}
    for flags in (of_recipes, typed):
        head, *values = flags.pop("method_args", [""])
        knobs |= _knobs(head.partition("=")[2] or " ".join(values))
    return of_recipes | typed, knobs


def _knobs(text: str) -> dict[str, str]:
    """`gem.beta=0.5,kl.weight=0.1` by full name."""
    from lfu.methods import knob_pairs

    with value_errors_are_the_users():
        pairs = {name: str(value) for name, value in knob_pairs(text).items()}
    if short := next((name for name in pairs if "." not in name), None):
        raise UserError(f"--method_args: {short!r} must be METHOD.SETTING=VALUE where methods are compared")
    return pairs


def refuse_unused_knobs(options: Options) -> None:
    """Refuses a knob that no method has, and a flag of LfU's without LfU: they would be dropped without a word."""
    from lfu.study.settings import classes_of, is_lfu, lfu_fields

    methods = [setting.method for setting in options.settings]
    methods += [options.bisection.method] if options.bisection else []
    named = {name for method in methods for name in classes_of(method)}
    for knob in options.knobs:
        owner = knob.partition(".")[0]
        if owner not in named:
            raise UserError(f"--method_args {knob}: {owner!r} is not compared.{did_you_mean(owner, named)}")
    own = [words[0] for field, words in options.flags.items() if field in lfu_fields()]
    if own and not any(is_lfu(method) for method in methods):
        raise UserError(f"{own[0].partition('=')[0]} is LfU's own, and nothing that is compared has LfU in it")
