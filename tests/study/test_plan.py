"""What is to do next: the same for everybody, whatever order the runs are done in, and fair to all settings."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfu.study.build import steps_of
from lfu.study.choose import Bisection, Chosen, best_rate, candidate, edge_of, pareto_front
from lfu.study.plan import LEVELS, TIMING_STEPS, UNTOUCHED, Design, Run, Task, planned
from lfu.study.settings import Setting, make_setting, with_yardsticks
from lfu.support.errors import UserError

SFT, GEM, LFU = Setting("sft"), Setting("gem"), Setting("lfu")


@dataclass
class Done:
    """A run as far as it is."""

    level: str | None = None
    failed: bool = False
    diverged: bool = False
    validation: float | None = None
    step_seconds: float | None = None
    kept: dict[str, float] | None = None

    def finished(self, level: str) -> bool:
        return self.level is not None and LEVELS.index(self.level) >= LEVELS.index(level)


class World:
    """Runs whose results are known beforehand: `loss(run)`, `seconds(run)`; None is a failure."""

    def __init__(self, loss=lambda run: 1.0, seconds=lambda run: 1.0, kept=lambda run: {"prose": 1.0}):
        self.loss, self.seconds, self.kept, self.done = loss, seconds, kept, {}

    def __call__(self, run: Run) -> Done:
        return self.done.get(run, Done())

    def do(self, task: Task) -> None:
        loss = self.loss(task.run)
        if loss is None:
            self.done[task.run] = Done(failed=True)
        else:
            kept = self.kept(task.run) if task.level in ("rung", "full") else None
            self.done[task.run] = Done(task.level, validation=loss, step_seconds=self.seconds(task.run), kept=kept)

    def open(self, plan) -> list[Task]:
        return [t for t in plan.tasks if not (self(t.run).failed or self(t.run).finished(t.level))]


def design(methods=(SFT, GEM, LFU), **more) -> Design:
    given = {"seeds": [0, 1], "rates": ["1e-4"], "total_steps": lambda setting: 10} | more
    return Design(with_yardsticks(methods), **given)


def work_off(study: Design, world: World, pick=lambda tasks: 0):
    """Does what is planned, in any order, until nothing is left."""
    done = []
    for _ in range(1000):
        plan = planned(study, world)
        tasks = world.open(plan)
        if not tasks:
            return plan, done
        task = tasks[pick(tasks)]
        world.do(task)
        done.append(task)
    raise AssertionError("it never ends")


# --- equal steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "end"), [("1e-4", None), ("0.001", "highest"), ("5e-5", "lowest"), (None, None), ("2e-4", None)]
)
def test_a_learning_rate_at_the_end_of_the_search_is_told(chosen, end):
    assert edge_of({"1e-4": 2.0, "0.001": 1.0, "5e-5": None, "2e-4": 1.5}, chosen) == end


def test_one_learning_rate_needs_no_search():
    plan, done = work_off(design(), World())
    assert done == [Task(UNTOUCHED, "full")] + [
        Task(Run(s, seed, "1e-4", 10), "full") for seed in (0, 1) for s in (SFT, GEM, LFU)
    ]
    assert plan.whole


def test_the_search_is_the_same_for_all_and_its_winner_is_not_trained_again():
    best = {"sft": "3e-4", "gem": "1e-4", "lfu": "3e-4"}
    loss = lambda run: 0.5 if run.setting and run.learning_rate == best[run.setting.method] else 1.0
    plan, done = work_off(design(rates=["1e-4", "3e-4"]), World(loss))
    assert {s.method: rate for s, rate in plan.rates.items()} == best
    searched = [t.run for t in done if t.level == "search"]
    assert searched == [Run(s, 0, rate, 10) for s in (SFT, GEM, LFU) for rate in ("1e-4", "3e-4")]
    trained = {t.run for t in done if t.run.setting}
    assert len(trained) == 3 * (2 + 1)  # two trials and one more seed each
    assert all(run.learning_rate == best[run.setting.method] for runs in plan.runs["steps"].values() for run in runs)


def test_a_learning_rate_that_fails_is_out_of_the_race_and_a_setting_without_any_too():
    loss = lambda run: None if run.setting == GEM or run.learning_rate == "3e-4" else 1.0
    plan, _ = work_off(design(rates=["1e-4", "3e-4"]), World(loss))
    assert plan.rates == {SFT: "1e-4", LFU: "1e-4"}
    assert set(plan.runs["steps"]) == {SFT, LFU}
    assert plan.whole


def test_a_setting_with_a_learning_rate_of_its_own_is_not_searched():
    own = make_setting("lfu", {"learning_rate": "1e-3"})
    plan, _ = work_off(design([SFT, own], rates=["1e-4", "3e-4"]), World())
    assert plan.rates[own] == plan.rates[own.yardstick] == "1e-3"


# --- equal time -----------------------------------------------------------------------------------------------------


def test_equal_time_is_sfts_time_in_steps_of_ones_own():
    seconds = {"sft": 1.0, "gem": 1.24, "lfu": 2.0}
    world = World(seconds=lambda run: seconds[run.setting.method] if run.setting else None)
    plan, _ = work_off(design(equal=("steps", "time")), world)
    assert {s.method: runs[0].steps for s, runs in plan.runs["time"].items()} == {"sft": 10, "gem": 8, "lfu": 5}
    assert plan.runs["time"][SFT] == plan.runs["steps"][SFT]  # the very same runs


@pytest.mark.parametrize(("total", "level"), [(10, 10), (100, TIMING_STEPS)])
def test_equal_time_alone_is_timed_with_few_steps(total, level):
    world = World(seconds=lambda run: {"sft": 1.0, "lfu": 2.0}[run.setting.method] if run.setting else None)
    plan, done = work_off(design([SFT, LFU], equal=("time",), total_steps=lambda s: total), world)
    assert [t.run.steps for t in done if t.level == "timing"] == [level, level]
    assert plan.runs["time"][LFU][0].steps == total // 2
    assert "steps" not in plan.runs


def test_a_timing_run_holds_a_whole_cycle_of_a_methods_steps():
    study = design([LFU], equal=("time",), total_steps=lambda s: 100, cycle=lambda s: 16 if s == LFU else 1)
    _, done = work_off(study, World())
    assert [t.run.steps for t in done if t.level == "timing"] == [TIMING_STEPS, 17]  # the first step warms up


@pytest.mark.parametrize("rates", [["1e-4"], ["1e-4", "3e-4"]])
def test_another_seed_changes_no_runs_steps(rates):
    """A study can be widened without doing anything again, whatever the clocks say then."""
    world = World(seconds=lambda run: run.seed + len(run.label) if run.setting else None)
    modes = ("steps", "time")
    narrow, _ = work_off(design([SFT, LFU, GEM], seeds=[0], equal=modes, rates=rates), world)
    before = set(world.done)
    wide, done = work_off(design([SFT, LFU, GEM], seeds=[0, 1, 2], equal=modes, rates=rates), world)
    assert not before & {task.run for task in done}
    for setting, (run,) in narrow.runs["time"].items():
        assert wide.runs["time"][setting][0] == run


def test_a_first_seed_that_fails_leaves_the_time_to_the_next():
    fails = lambda run: None if run.setting == LFU and run.seed == 0 else 1.0
    world = World(fails, seconds=lambda run: {"sft": 1.0, "lfu": 2.0}[run.setting.method] if run.setting else None)
    plan, _ = work_off(design([SFT, LFU], equal=("steps", "time")), world)
    assert plan.runs["time"][LFU][1].steps == 5


def test_without_sfts_time_there_is_no_equal_time():
    plan, _ = work_off(design(equal=("steps", "time")), World(lambda run: None if run.setting == SFT else 1.0))
    assert plan.runs.get("time", {}) == {}
    assert plan.whole


@settings(max_examples=40)
@given(st.data())
def test_the_order_of_the_work_changes_nothing(data):
    """Any number of workers, taking any open task: the same runs in the end, equal in number for all settings."""
    fails = data.draw(st.sets(st.tuples(st.sampled_from(["sft", "gem", "lfu"]), st.integers(0, 2)), max_size=3))
    rates = data.draw(st.sampled_from([["1e-4"], ["1e-4", "3e-4"], ["1", "2", "3"]]))
    equal = data.draw(st.sampled_from([("steps",), ("time",), ("steps", "time")]))
    loss = lambda run: None if run.setting and (run.setting.method, run.seed) in fails else hash(run.label) % 7 + 1.0
    seconds = lambda run: len(run.label) * 1.0
    study = design(rates=rates, equal=equal, seeds=[0, 1, 2])
    world, other = World(loss, seconds), World(loss, seconds)
    plan, _ = work_off(study, world)
    shuffled, _ = work_off(study, other, lambda tasks: data.draw(st.integers(0, len(tasks) - 1)))
    assert plan == shuffled
    assert {run: d.level for run, d in world.done.items()} == {run: d.level for run, d in other.done.items()}
    assert plan.whole
    searched = [run.setting for run in {t.run for t in plan.tasks if t.level == "search"}]
    assert len({searched.count(s) for s in study.settings}) == 1
    for runs in plan.runs.values():
        assert len({tuple(run.seed for run in each) for each in runs.values()}) <= 1


# --- what is chosen -------------------------------------------------------------------------------------------------


def test_the_best_learning_rate():
    assert best_rate({"1": 2.0, "2": 1.0, "3": 1.0}) == "2"
    assert best_rate({"1": None, "2": float("nan"), "3": 4.0}) == "3"
    assert best_rate({"1": None}) is None


@given(st.floats(0.011, 0.99), st.integers(0, 6))
def test_bisection_brackets_the_threshold(threshold, steps):
    bisection = Bisection("lfu", "alpha", 0.01, 1.0, steps)
    tried = {}
    while (value := bisection.next(tried)) is not None:
        assert value not in tried
        tried[value] = value > threshold
    holds, collapses = bisection.bracket(tried)
    assert holds <= threshold < collapses
    assert len(tried) <= steps + 2
    # each halving halves the bracket's logarithm; values are rounded to three digits
    assert collapses / holds <= 100 ** (1 / 2**steps) * 1.05


@pytest.mark.parametrize(("collapsed", "bracket"), [(True, (None, 0.01)), (False, (1.0, None))])
def test_a_threshold_outside_the_range(collapsed, bracket):
    bisection = Bisection("lfu", "alpha", 0.01, 1.0)
    tried = {}
    while (value := bisection.next(tried)) is not None:
        tried[value] = collapsed
    assert set(tried) == {0.01, 1.0}
    assert bisection.bracket(tried) == bracket


def test_bisection_in_a_study():
    """Collapse is a loss above the untouched model's; the points become settings with all seeds."""
    alpha = lambda run: float(dict(run.setting.own).get("alpha", 0)) if run.setting else 0
    world = World(lambda run: 2.0 if run.setting is None else 3.0 if alpha(run) > 0.2 else 1.0)
    study = design([SFT], bisection=Bisection("lfu", "alpha", 0.01, 1.0, 2))
    plan, _ = work_off(study, world)
    assert [s.label for s in plan.settings] == ["sft", *(f"lfu alpha={a}" for a in ("0.01", "0.1", "0.316", "1"))]
    assert all(len(runs) == 2 for runs in plan.runs["steps"].values())
    assert plan.whole


@pytest.mark.parametrize(
    ("name", "low", "high"), [("alpha", 1, 0.1), ("alpha", 0, 1), ("learning_rate", 1, 2), ("x", 1, 2)]
)
def test_bisections_that_make_no_sense(name, low, high):
    with pytest.raises(UserError):
        Bisection("lfu", name, low, high)


def test_the_candidate_is_the_best_that_forgets_no_more():
    sft, lfu = Chosen("sft", "sft", 1.0, False), Chosen("lfu", "lfu", 0.9, False)
    assert candidate([sft, lfu]) == lfu
    assert candidate([sft, Chosen("gem", "gem", 0.5, True), lfu]) == lfu
    assert candidate([Chosen("lfu", "lfu", 1.0, False), sft]) == sft  # a tie is plain SFT's
    assert candidate([Chosen("lfu", "lfu", float("nan"), False)]) is None


@given(st.dictionaries(st.text(max_size=2), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_the_pareto_front_is_what_nothing_beats(points):
    front = pareto_front(points)
    assert front
    for label, (x, y) in points.items():
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
        assert (label in front) == (not beaten)
    assert [points[label] for label in front] == sorted(points[label] for label in front)


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "drop", "steps"),
    [
        (44, 4, 1, 3, False, 33),
        (45, 4, 1, 1, False, 12),
        (45, 4, 1, 1, True, 11),
        (45, 4, 4, 2.5, False, 8),
        (1, 4, 4, 1, False, 1),
    ],
)
def test_steps_are_counted_as_the_trainer_counts(rows, batch, accumulation, epochs, drop, steps):
    config = SimpleNamespace(
        max_steps=-1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs, dataloader_drop_last=drop, train_batch_size=4 * batch,  # as on a machine of 4 GPUs
    )  # fmt: skip
    assert steps_of(config, rows) == steps
    config.max_steps = 7
    assert steps_of(config, rows) == 7


# --- halving --------------------------------------------------------------------------------------------------------


def thinned(methods, rates, **more):
    return design(methods, rates=rates, total_steps=lambda setting: 90, halving="rung", **more)


RATES = ["1e-5", "3e-5", "1e-4", "3e-4"]
METHODS = [SFT, GEM, LFU, *(make_setting("kl", {"weight": str(w)}) for w in (0.1, 0.2, 0.3, 0.4))]


def by_rate(best):
    """The loss is lowest for one method at one rate."""
    return lambda run: 3.0 if run.setting is None else (1.0 if (run.setting, run.learning_rate) == best else 2.0)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_halving_comes_to_the_same_in_any_order(seed):
    rng = __import__("random").Random(seed)
    world = lambda: World(by_rate((GEM, "3e-5")))
    plan, _ = work_off(thinned(METHODS, RATES), world(), pick=lambda tasks: rng.randrange(len(tasks)))
    other, _ = work_off(thinned(METHODS, RATES), world())
    assert (plan.rates, plan.settings) == (other.rates, other.settings)
    assert plan.rates[GEM] == "3e-5"
    assert SFT in plan.rates


def test_halving_costs_three_plain_searches_at_most_and_a_third_of_the_full_one():
    """The shipped frontier's numbers: 7 settings at 4 rates; the plain search is plain SFT's, 4 trainings in full."""
    study = thinned(METHODS, RATES, seeds=[0])
    plan, done = work_off(study, World(by_rate((LFU, "1e-4"))))
    steps = sum(task.run.steps for task in done if task.run.setting)
    assert [len(runs) for runs in plan.rungs] == [28, 10]
    assert steps <= 3 * 4 * 90
    full = [task for task in done if task.level == "full" and task.run.setting]
    assert {task.run.steps for task in full} == {90}
    assert len(full) == len(plan.rates)


def test_what_learns_less_and_keeps_more_goes_on_too():
    """Neither of two that no other beats at both is lost to the other."""
    keeper, learner = METHODS[3], METHODS[4]
    loss = lambda run: 3.0 if run.setting is None else {keeper: 2.5, learner: 1.0}.get(run.setting, 2.6)
    kept = lambda run: {"prose": 1.0 if run.setting in (None, keeper) else 2.0}
    plan, _ = work_off(thinned(METHODS, ["1e-4"]), World(loss, kept=kept))
    assert {keeper, learner} <= set(plan.rates)


def test_plain_sft_stays_however_bad_it_is_and_what_fails_goes():
    loss = lambda run: None if run.setting == GEM else 9.0 if run.setting == SFT else 1.0
    plan, _ = work_off(thinned(METHODS, ["1e-4"]), World(loss))
    assert SFT in plan.rates
    assert GEM not in plan.rates
    assert GEM not in plan.settings


def test_a_survivors_yardstick_is_trained_too():
    longer = make_setting("gem", {"num_train_epochs": "6"})
    loss = lambda run: 1.0 if run.setting == longer else 2.0
    plan, _ = work_off(thinned([*METHODS, longer], ["1e-4", "1e-5"]), World(loss))
    assert longer in plan.rates
    assert longer.yardstick in plan.rates
