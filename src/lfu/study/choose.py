"""What is chosen, and by which rows: a learning rate, the point of collapse, the recommended setting.

Test rows choose nothing. The validation rows, and every third item of what should be kept, do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lfu.evaluation.intervals import Interval
from lfu.study.rows import Split
from lfu.study.settings import YARDSTICK, Setting, make_setting
from lfu.support.errors import UserError

T = TypeVar("T")


def best_rate(losses: Mapping[str, float | None]) -> str | None:
    """The learning rate with the lowest loss on the validation rows; None where no loss is known. Ties: the first."""
    known = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(known, key=known.__getitem__) if known else None


def edge_of(losses: Mapping[str, float | None], chosen: str | None) -> str | None:
    """`highest` or `lowest`, where the chosen rate is an end of those that were tried: a better one may lie beyond."""
    rates = sorted(losses, key=float)
    return {rates[0]: "lowest", rates[-1]: "highest"}.get(chosen or "") if len(rates) > 1 else None


@dataclass(frozen=True)
class Bisection:
    """The search for the value of a parameter from which on training collapses, on a logarithmic scale.

    Collapse: the loss on the validation rows is above the untouched model's, or no finite number. First the two ends
    are tried, then `steps` times the middle of the bracket.
    """

    method: str
    name: str
    low: float
    high: float
    steps: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise UserError(f"--bisect {self.name}: the ends must be 0 < LOW < HIGH, got {self.low} and {self.high}")
        if self.setting(self.low).shared:  # an unknown name shows here, too
            raise UserError(f"--bisect {self.name}: plain SFT has it too, so it is no setting of {self.method}")

    def setting(self, value: float) -> Setting:
        """The setting with the parameter at that value."""
        return make_setting(self.method, {self.name: f"{float(f'{value:.3g}'):g}"})

    def next(self, collapsed: Mapping[float, bool]) -> float | None:
        """The value to try next, given those tried so far; None once the bracket is as narrow as asked for."""
        for end in (self.low, self.high):
            if end not in collapsed:
                return end
        if collapsed[self.low] or not collapsed[self.high] or len(collapsed) >= self.steps + 2:
            return None
        holds, collapses = self.bracket(collapsed)
        if holds is None or collapses is None:
            return None
        middle = float(f"{math.sqrt(holds * collapses):.3g}")
        return None if middle in collapsed else middle

    def bracket(self, collapsed: Mapping[float, bool]) -> tuple[float | None, float | None]:
        """(the largest value below all that collapse, the smallest that collapses); None for an end not seen."""
        collapses = min((value for value, did in collapsed.items() if did), default=None)
        limit = math.inf if collapses is None else collapses
        holds = max((value for value, did in collapsed.items() if not did and value < limit), default=None)
        return holds, collapses


def fitting(settings: Sequence[Setting], parts: Split) -> list[Setting]:
    """The settings whose `data_limit` is not above the training rows; which are left out is added to `parts.said`.

    All of them where none is left: then it is a mistake, and not a grid that goes further than the rows.
    """
    limit = lambda setting: setting.values.get("data_limit", "")
    most = len(parts.train)
    large = [each for each in settings if limit(each).isdecimal() and int(limit(each)) > most]
    if not large or len(large) == len(settings):
        return list(settings)
    sizes = ", ".join(dict.fromkeys(map(limit, large)))
    parts.said.append(f"Left out are sizes above the {most} rows that are left for training: {sizes}.")
    return [each for each in settings if each not in large]


def held_against(setting: Setting, settings: Sequence[Setting]) -> list[Setting | None]:
    """What a setting may forget no more than: plain SFT with its training flags; if it has flags of its own, also plain
    SFT without them, or None, the untouched model, where that is not among `settings`.

    The first of them is what its results are compared with. Plain SFT without flags of its own is held against nothing.
    """
    found: list[Setting | None] = [] if setting == setting.yardstick else [setting.yardstick]
    if setting.shared:
        plain = Setting(YARDSTICK)
        found.append(plain if plain in settings else None)
    return found


def compared_with(setting: Setting, settings: Sequence[Setting]) -> Setting | None:
    """The plain SFT that a setting's results are compared with; None: the untouched model."""
    return next(iter(held_against(setting, settings)), None)


@dataclass(frozen=True)
class Chosen:
    """A setting as the choosing rows see it."""

    label: str
    method: str
    loss: float | None  # mean over the seeds that all settings have; None where a run failed
    forgets_more: bool = False  # beyond the noise, than anything that it is held against
    against: dict[str, dict[str, Interval]] = field(default_factory=dict)  # rival -> kept set -> the difference


def candidate(settings: Sequence[Chosen]) -> Chosen | None:
    """The lowest loss among the settings that forget no more than they may. Ties go to plain SFT, else to the first."""
    fit = [(one.loss, one) for one in settings if one.loss is not None and not one.forgets_more]
    finite = [(loss, one) for loss, one in fit if math.isfinite(loss)]
    return min(finite, key=lambda pair: (pair[0], pair[1].method != YARDSTICK), default=(None, None))[1]


def pareto_front(points: Mapping[T, tuple[float, float]]) -> list[T]:
    """The points that no other beats: at least as good on both axes (more is better) and better on one."""
    beats = lambda other, one: other[0] >= one[0] and other[1] >= one[1] and other != one
    front = [name for name, one in points.items() if not any(beats(other, one) for other in points.values())]
    return sorted(front, key=points.__getitem__)
