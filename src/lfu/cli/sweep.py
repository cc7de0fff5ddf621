"""Which strength is best for your model and your data? Trains one method with every combination of the given values,
and plain SFT beside it. Everything else is as in lfu compare.

Every other flag of lfu train applies to all runs (--learning_rate, --num_train_epochs, --use_peft, ...)."""

from dataclasses import dataclass
from typing import Any

from lfu.cli.study import Command, run_study
from lfu.study.options import WHAT
from lfu.support.errors import UserError
from lfu.support.flags import flag, not_negative, value_of
from lfu.support.words import listed


def run(argv: list[str]) -> int:
    """Trains, measures, writes the report, and prints what was found."""
    return run_study("sweep", Sweep, argv, __doc__)


def _param(text: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    return name.strip(), listed(values)


def _ends(text: str) -> tuple[str, float, float]:
    name, _, ends = text.partition("=")
    low, _, high = ends.partition(":")
    return name.strip(), float(low), float(high)


param_of = value_of(
    _param, "NAME=V,V with different values", lambda param: param[0] and 0 < len(param[1]) == len(set(param[1]))
)
ends_of = value_of(_ends, "NAME=LOW:HIGH, as in alpha=0.01:1")


@dataclass(kw_only=True)
class Sweep(Command):
    """One method, with every combination of some values, or with those of a bisection."""

    method: str = flag(WHAT, "lfu", "the method, or a combination such as lfu+neftune (default: lfu)", metavar="M")
    param: list[tuple[str, list[str]]] = flag(
        WHAT, [], "a setting of the method or a training flag, with its values: --param alpha=0.01,0.1 --param lam=1,5",
        action="append", type=param_of, metavar="NAME=V,V",
    )  # fmt: skip
    bisect: tuple[str, float, float] | None = flag(
        WHAT, None, "search for the value above which training collapses: the loss on the validation rows exceeds the "
        "untouched model's", type=ends_of, metavar="NAME=LOW:HIGH",
    )  # fmt: skip
    bisect_steps: int | None = flag(WHAT, None, "halvings of that range (default: 4)", type=not_negative)

    def settings(self, rates: list[str]) -> dict[str, Any]:
        """The settings of the grid, and the bisection."""
        from lfu.study.choose import Bisection
        from lfu.study.settings import YARDSTICK, Setting, grid

        if not self.param and not self.bisect:
            raise UserError("nothing to sweep: give --param NAME=V,V (--param alpha=0.01,0.1), --bisect, or a --preset")
        if not self.bisect and self.bisect_steps is not None:
            raise UserError("--bisect_steps says how often --bisect halves its range: give --bisect, too")
        settings = grid(self.method, dict(self.param)) if self.param else [Setting(YARDSTICK)]
        found: dict[str, Any] = {"settings": settings, "skip_larger": True}
        if self.bisect:
            if len(rates) > 1:
                raise UserError("--bisect goes with one learning rate: give --learning_rate")
            steps = 4 if self.bisect_steps is None else self.bisect_steps
            found["bisection"] = Bisection(self.method, *self.bisect, steps)
        return found
