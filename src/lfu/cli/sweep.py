"""Which strength, on your model and your data? Trains one method with every combination of the given values, and plain
SFT beside it; otherwise as lfu compare.

Every other flag of lfu train is passed to all runs alike (--learning_rate, --num_train_epochs, --use_peft, ...)."""

from __future__ import annotations

import argparse
from typing import Any

from lfu.cli.compare import run_study
from lfu.support.errors import UserError
from lfu.support.flags import not_negative


def run(argv: list[str]) -> int:
    """Trains, measures, writes the report, and prints what was found.

    Raises:
        UserError, KeyboardInterrupt: as `lfu compare`.
    """
    return run_study("sweep", argv, __doc__, add_grid, settings_of_grid)


def add_grid(parser: argparse.ArgumentParser) -> None:
    """What is compared."""
    parser.add_argument(
        "--method", default="lfu", metavar="M", help="the method, or a combination such as lfu+neftune (default: lfu)"
    )
    parser.add_argument(
        "--param", action="append", default=[], type=_param_of, metavar="NAME=V,V",
        help="a setting of the method or a training flag, with its values: --param alpha=0.01,0.1 --param lam=1,5",
    )  # fmt: skip
    parser.add_argument(
        "--bisect", type=_ends_of, metavar="NAME=LOW:HIGH",
        help="search for the value above which training collapses: the loss on the validation rows exceeds the "
        "untouched model's",
    )  # fmt: skip
    parser.add_argument(
        "--bisect_steps",
        type=not_negative,
        default=4,
        metavar="N",
        help="number of times to halve that range (default: 4)",
    )


def settings_of_grid(given: argparse.Namespace) -> dict[str, Any]:
    """The settings of the grid, and the bisection.

    Raises:
        UserError: neither was asked for; an unknown method or name.
    """
    from lfu.study.choose import Bisection
    from lfu.study.settings import YARDSTICK, Setting, grid

    if not given.param and not given.bisect:
        raise UserError("nothing to sweep: give --param NAME=V,V (--param alpha=0.01,0.1), --bisect, or a --preset")
    settings = grid(given.method, dict(given.param)) if given.param else [Setting(YARDSTICK)]
    found: dict[str, Any] = {"settings": settings, "skip_larger": True}
    if given.bisect:
        if given.learning_rates and len(given.learning_rates) > 1:
            raise UserError("--bisect goes with one learning rate: give --learning_rate")
        name, low, high = given.bisect
        found["bisection"] = Bisection(given.method, name, low, high, given.bisect_steps)
    return found


def _param_of(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not equals or not name.strip() or not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"must be NAME=V,V with different values, got {text!r}")
    return name.strip(), found


def _ends_of(text: str) -> tuple[str, float, float]:
    name, _, ends = text.partition("=")
    low, _, high = ends.partition(":")
    try:
        return name.strip(), float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=LOW:HIGH, as in alpha=0.01:1, got {text!r}") from None
