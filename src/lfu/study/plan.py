"""From what is finished to what is to do: the runs of a study, as a pure function of the results so far.

Levels of a run: `timing` (trained, to know the time of a step), `search` (trained and scored on the validation rows),
`rung` (scored on what should be kept, too), `full` (everything measured). A run that is finished at one level goes on
from there at the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from lfu.study.choose import Bisection, best_rate
from lfu.study.halving import RUNGS, best_first, passing, scores_of, short_steps
from lfu.study.settings import Setting

if TYPE_CHECKING:
    from lfu.study.folder import Place

LEVELS = ("timing", "search", "rung", "full")
TIMING_STEPS = 12


@dataclass(frozen=True)
class Run:
    """One training; `setting` None is the untouched model, which isn't trained."""

    setting: Setting | None
    seed: int = 0
    learning_rate: str = ""
    steps: int = 0

    @property
    def label(self) -> str:
        return self.setting.label if self.setting else "untouched"

    @property
    def described(self) -> dict[str, Any]:
        """What it is, JSON-ready."""
        return {"label": self.label, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "setting"}}


UNTOUCHED = Run(None)
Find = Callable[[Run], "Place"]  # what is known of a run


@dataclass(frozen=True)
class Task:
    """A run, and how far it is wanted."""

    run: Run
    level: str


@dataclass(frozen=True)
class Design:
    """What decides which runs there are."""

    settings: Sequence[Setting]  # yardsticks first
    seeds: Sequence[int]
    rates: Sequence[str]  # those that each setting is tried with which does not set its own
    total_steps: Callable[[Setting], int]  # of a run with equal steps
    equal: Sequence[str] = ("steps",)  # what runs are compared at: `steps`, `time`
    bisection: Bisection | None = None
    cycle: Callable[[Setting], int] = lambda setting: 1  # steps after which the cost of its steps repeats
    halving: str | None = None  # the level at which short trainings thin out settings and rates, if they do

    def rates_of(self, setting: Setting) -> list[str]:
        own = setting.values.get("learning_rate")
        return [own] if own is not None else list(self.rates)

    def first_run(self, setting: Setting, rate: str) -> Run:
        return Run(setting, self.seeds[0], rate, self.total_steps(setting))


@dataclass
class Plan:
    """The tasks known so far, in the order in which they should be done."""

    settings: list[Setting]  # those of the design, and those that a bisection has come to
    tasks: list[Task] = field(default_factory=list)
    rates: dict[Setting, str] = field(default_factory=dict)  # absent while not chosen, or all failed
    runs: dict[str, dict[Setting, list[Run]]] = field(default_factory=dict)  # mode -> runs, one a seed
    rungs: list[list[Run]] = field(default_factory=list)  # the short runs of each round of halving
    collapsed: dict[float, bool] = field(default_factory=dict)  # value tried -> whether training did
    whole: bool = True  # no further task can come


def planned(design: Design, found: Find) -> Plan:
    """The plan, as far as the results allow to see it."""
    plan = Plan(list(design.settings), [Task(UNTOUCHED, "full")])
    if design.halving:
        _thin_out(plan, design, design.halving, found)
    else:
        _choose_rates(plan, design, found)
    if design.bisection:
        _bisect(plan, design, design.bisection, found)
    if "steps" in design.equal:
        plan.runs["steps"] = {
            setting: [Run(setting, seed, rate, design.total_steps(setting)) for seed in design.seeds]
            for setting, rate in plan.rates.items()
        }
        _add_by_seed(plan, design, plan.runs["steps"])
    if "time" in design.equal:
        _same_time(plan, design, found)
    return plan


def _choose_rates(plan: Plan, design: Design, found: Find) -> None:
    for setting in design.settings:
        rates = design.rates_of(setting)
        if len(rates) == 1:
            plan.rates[setting] = rates[0]
            continue
        trials = {rate: design.first_run(setting, rate) for rate in rates}
        plan.tasks += [Task(run, "search") for run in trials.values()]
        outcomes = {rate: found(run) for rate, run in trials.items()}
        if all(_over(outcome, "search") for outcome in outcomes.values()):
            best = best_rate({rate: None if o.failed else o.validation for rate, o in outcomes.items()})
            if best is not None:
                plan.rates[setting] = best
        else:
            plan.whole = False


def _thin_out(plan: Plan, design: Design, level: str, found: Find) -> None:
    """Settings and their rates by successive halving; the best plain SFT and what survivors are compared with stay."""
    left = ranked = [(setting, rate) for setting in design.settings for rate in design.rates_of(setting)]
    for share in RUNGS:
        whole = {each: design.first_run(*each) for each in left}
        short = {each: replace(run, steps=short_steps(run.steps, share)) for each, run in whole.items()}
        plan.rungs.append(list(short.values()))
        plan.tasks += [Task(run, level) for run in short.values()]
        places = {each: found(run) for each, run in short.items()}
        if not all(_over(place, level) for place in places.values()):
            plan.whole = False
            return
        order = best_first(scores_of(places, found(UNTOUCHED)))
        left = passing(order)
        ranked = list(dict.fromkeys([*left, *order, *ranked]))
    for setting, rate in left:
        plan.rates.setdefault(setting, rate)
    for setting in list(plan.rates):  # what it is compared with
        best = next((rate for other, rate in ranked if other == setting.yardstick), None)
        if best:
            plan.rates.setdefault(setting.yardstick, best)
    plan.settings = [setting for setting in design.settings if setting in plan.rates]


def _bisect(plan: Plan, design: Design, bisection: Bisection, found: Find) -> None:
    """The values that the bisection has come to become settings; each is judged by its first run."""
    bar, points = found(UNTOUCHED).validation, []
    while (value := bisection.next(plan.collapsed)) is not None:
        points.append(value)
        setting = bisection.setting(value)
        run = design.first_run(setting, design.rates_of(setting)[0])
        plan.tasks.append(Task(run, "search"))
        place = found(run)
        if found(UNTOUCHED).failed or (place.failed and not place.diverged):
            break  # nothing can be said about collapse
        if bar is None or not _over(place, "search"):
            plan.whole = False
            break
        plan.collapsed[value] = place.diverged or place.validation is None or place.validation > bar
    for setting in map(bisection.setting, sorted(points)):
        plan.rates[setting] = design.rates_of(setting)[0]
        if setting not in plan.settings:
            plan.settings.append(setting)


def _add_by_seed(plan: Plan, design: Design, runs: Mapping[Setting, Sequence[Run]]) -> None:
    """Seed by seed, so that a study that is stopped half-way has all methods alike."""
    for number in range(len(design.seeds)):
        plan.tasks += [Task(each[number], "full") for each in runs.values()]


def _same_time(plan: Plan, design: Design, found: Find) -> None:
    """Each setting gets the wall-clock of its yardstick's run with equal steps, in steps of its own."""
    basis = {setting: _timed(plan, design, setting, rate) for setting, rate in plan.rates.items()}
    if "steps" not in design.equal:
        for setting, runs in basis.items():
            level = "search" if len(design.rates_of(setting)) > 1 else "timing"
            plan.tasks += [Task(run, level) for run in runs]
    # by the first run that doesn't fail: None until it is known; NaN if all of them fail
    of = lambda runs: next((place.step_seconds for run in runs if not (place := found(run)).failed), math.nan)
    times = {setting: of(runs) for setting, runs in basis.items()}
    by_time: dict[Setting, list[Run]] = {}
    for setting, rate in plan.rates.items():
        ours, theirs = times[setting], times.get(setting.yardstick, math.nan)
        if ours is None or theirs is None:
            plan.whole = False
        elif not math.isnan(ours) and not math.isnan(theirs):
            steps = max(1, round(design.total_steps(setting) * theirs / ours))
            by_time[setting] = [Run(setting, seed, rate, steps) for seed in design.seeds]
    if by_time:
        plan.runs["time"] = by_time
        _add_by_seed(plan, design, by_time)


def _timed(plan: Plan, design: Design, setting: Setting, rate: str) -> list[Run]:
    """The runs that can tell how long a step of the setting takes: the first that doesn't fail does.

    Not all of them together: with a seed more, the steps of the runs that are finished would be others.
    """
    if "steps" in plan.runs:
        return plan.runs["steps"][setting]
    if len(design.rates_of(setting)) > 1:
        return [design.first_run(setting, rate)]
    steps = min(design.total_steps(setting), max(TIMING_STEPS, 1 + design.cycle(setting)))
    return [Run(setting, design.seeds[0], rate, steps)]


def _over(outcome: Place, level: str) -> bool:
    return outcome.failed or outcome.finished(level)
