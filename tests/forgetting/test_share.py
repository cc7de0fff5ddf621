"""Measuring keeps to its share of the run's time: by a clock that only steps and items move on."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from runs import curve, model, trainer
from transformers import TrainerCallback

from lfu import ForgettingCallback
from lfu.forgetting import items, measuring, share
from lfu.forgetting.share import LEAST, PAGE, Share

SIZES = {"questions": 300, "prose": 40, "written": 24}


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(share.time, "monotonic", lambda: Clock.now)
    return Clock


@dataclass
class Simulated:
    """A run of 100 steps that would like to be measured every tenth; an item takes a hundredth of a second."""

    clock: type
    step_seconds: float
    share_of_time: float | None = 0.05
    guess: float = 1.0  # how many times too long the run is expected to be
    steps: int = 100
    fewest: int = 1
    useful: range = range(1, 101)  # steps
    asked: dict[int, int] = field(default_factory=dict)  # step -> items

    def run(self, start=0, stop=None, made=None):
        """From step `start` to `stop`, with what an earlier session left of its Share."""
        self.made = Share(self.share_of_time, **made) if made else Share(self.share_of_time, SIZES)
        if not made:
            self.made.each = dict.fromkeys(SIZES, 0.01)
            self.made.plan(self.guess * self.steps * self.step_seconds, 1.0)
            self.ask(0)
        for step in range(start + 1, (stop or self.steps) + 1):
            self.clock.now += self.step_seconds
            if step % 10 == 0:
                to_come = (self.steps - step) / 10 + 1
                fewest = max(1, self.fewest + 1 - len(self.asked))
                if self.made.due(step, self.steps, to_come, fewest, step in self.useful):
                    self.ask(step)
        self.made.kept()
        self.part = self.made.spent / (self.made.spent + self.made.trained)
        return self

    def ask(self, step):
        self.asked[step] = sum(self.made.counts().values())
        self.clock.now += 0.01 * self.asked[step]
        self.made.measured(0.01 * self.asked[step])
        self.made.last = step


@pytest.mark.parametrize("guess", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("step_seconds", [0.6, 1.0, 5.0, 100.0])
def test_measuring_keeps_to_its_share(clock, guess, step_seconds):
    found = Simulated(clock, step_seconds, guess=guess).run()
    assert found.made.spent <= 0.05 * 100 * step_seconds - PAGE
    assert found.asked[0] == max(found.asked.values())
    assert min(found.asked.values()) >= 2 * LEAST
    assert 100 in found.asked
    if step_seconds == 100:
        assert set(found.asked.values()) == {364}
        assert len(found.asked) == 11


def test_fewer_items_come_before_fewer_readings_and_these_are_spread_evenly(clock):
    steps = {}
    for step_seconds in (5.0, 1.0, 0.5, 0.3):
        steps[step_seconds] = Simulated(clock, step_seconds).run().asked
    assert list(steps[5.0]) == list(range(0, 101, 10))
    assert steps[5.0][10] < steps[5.0][0]
    for step_seconds, gaps in ((1.0, {10, 20}), (0.5, {20, 30, 40, 50, 60}), (0.3, {100})):
        readings = list(steps[step_seconds])
        assert {b - a for a, b in pairwise(readings)} <= gaps, step_seconds
    assert len(steps[1.0]) > len(steps[0.5]) > len(steps[0.3])


def test_the_least_is_measured_even_where_it_is_too_much_and_said_with_the_way_out(clock):
    found = Simulated(clock, 0.01).run()
    assert list(found.asked) == [0, 100]
    assert set(found.asked.values()) == {2 * LEAST}  # and no text of the model's own
    assert found.part > 0.05
    told = found.made.told()
    assert f"{100 * found.part:.1f} % of the run, more than the 5 % asked for" in told
    allowed = float(told.partition("share_of_time=")[2].split(" ")[0])
    assert found.part <= allowed <= found.part + 0.02
    assert "asked for" not in Simulated(clock, 5.0).run().made.told()
    assert len(Simulated(clock, 0.01, share_of_time=None).run().asked) == 11


@pytest.mark.parametrize(("step_seconds", "short"), [(0.34, False), (0.32, True)])  # the page takes 1 s of 1.7 or 1.6
def test_texts_are_cut_where_the_least_has_no_time_at_start_and_end(clock, step_seconds, short):
    found = Simulated(clock, step_seconds).run()
    assert set(found.asked.values()) == {2 * LEAST}  # 0.64 s in all
    assert found.made.short == short
    assert Share(0.05, **found.made.kept()).short == short


def test_what_is_useful_comes_first(clock):
    """As with `keep_best`: evaluations after step 40 are no better, so they can wait."""
    found = Simulated(clock, 0.5, useful=range(1, 41)).run()
    assert any(step <= 40 for step in list(found.asked)[1:])
    assert found.made.spent <= 0.05 * 50 - PAGE
    plenty = Simulated(clock, 100.0, useful=range(0)).run()
    assert len(plenty.asked) == 11
    for last in (100, 60):  # the last evaluation is better than all before, or it is not
        asked = Simulated(clock, 0.01, fewest=2, useful=range(1, last + 1)).run().asked
        assert list(asked) == [0, 50, 100] if last == 100 else [0, 50]


@pytest.mark.parametrize("step_seconds", [0.5, 1.0, 5.0])
def test_a_resumed_run_makes_the_same_choice(clock, step_seconds):
    whole = Simulated(clock, step_seconds).run()
    cut = Simulated(clock, step_seconds)
    kept = cut.run(stop=50).made.kept()
    clock.now += 1000  # the machine was down
    cut.run(start=50, made=kept)
    assert cut.asked == whole.asked
    assert cut.part == pytest.approx(whole.part)


class Steps(TrainerCallback):
    """Each step takes so many seconds."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def on_step_begin(self, args, state, control, **more):
        self.clock.now += self.seconds


@pytest.fixture
def timed(clock, monkeypatch):
    """What the model is asked takes a tenth of a second per item, writing the text and the page nothing."""

    def slow(function):
        def run(model, tokenizer, rows, *args, **options):
            clock.now += 0.1 * len(rows)
            return function(model, tokenizer, rows, *args, **options)

        return run

    for name in ("multiple_choice", "token_nll"):
        monkeypatch.setattr(measuring, name, slow(getattr(measuring, name)))
    monkeypatch.setattr(measuring, "seconds_to_write", lambda model, texts: 0.0)
    monkeypatch.setattr(share, "PAGE", 0.0)
    return clock


BEST = dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True, learning_rate=1e-3, max_steps=24)


def short_run(timed, folder, step_seconds, lines=None, callback=None, **options):
    say = (lambda line: None) if lines is None else lines.append
    made = callback or ForgettingCallback(budget=10.0, keep_best=True, page=False, say=say)
    run = trainer("plain", folder, [Steps(timed, step_seconds), made], **BEST | options)
    return run, made


def test_a_short_run_keeps_to_its_share_and_the_best_checkpoint_was_measured(timed, tmp_path):
    assert len(items.general_knowledge()) == 24
    lines = []
    run, callback = short_run(timed, tmp_path, 10.0, lines)
    run.train()
    steps = [reading.step for reading in callback.memory.readings]
    assert 0 < len(steps) < 12
    assert run.state.best_global_step in steps
    assert callback.measuring.share.spent <= 0.05 * timed.now
    assert sum("only a checkpoint that was measured" in line for line in lines) == 1
    assert "% of the run" in lines[-1]
    assert "asked for" not in lines[-1]


def test_too_short_a_run_is_measured_once_before_its_end_and_told_the_true_share(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "SHORT", 8)
    lines = []
    run, callback = short_run(timed, tmp_path, 0.1, lines)
    run.train()
    assert "(of 8 tokens, as the run is short)" in lines[0]
    steps = [reading.step for reading in callback.memory.readings]
    assert steps[0] == 12
    assert run.state.best_global_step in steps
    part = callback.measuring.share.spent / timed.now
    assert part > 0.05
    assert f"{100 * part:.1f} % of the run, more than the 5 % asked for" in lines[-1]
    monkeypatch.setattr(measuring, "LONGEST", 8)
    cut = measuring.Measuring(model().eval(), run.processing_class, callback.sets, {}, None, 4, 0)
    wanted = cut.ask({"questions": 16, "prose": 16}, None)
    assert callback.memory.before.nll["prose"] == pytest.approx(wanted.nll["prose"])


@pytest.mark.parametrize("seconds", [10.0, 0.1])
def test_a_killed_short_run_resumes_with_the_same_choice(timed, tmp_path, seconds, monkeypatch):
    monkeypatch.setattr(measuring, "SHORT", 8)
    whole, one = short_run(timed, tmp_path / "whole", seconds)
    whole.train()
    wanted = one.measuring.share.kept()
    run, _ = short_run(timed, tmp_path / "cut", seconds)
    run.add_callback(_StopAt(12))
    run.train()
    timed.now += 5000
    run, other = short_run(timed, tmp_path / "cut", seconds)
    run.train(resume_from_checkpoint=True)
    assert curve(run) == curve(whole)
    assert other.measuring.longest == 8
    found = other.measuring.share.kept()
    assert found.pop("trained") == pytest.approx(wanted.pop("trained"))
    assert found.pop("each") == pytest.approx(wanted.pop("each"))
    assert found.pop("spent") == pytest.approx(wanted.pop("spent"))
    assert found == wanted


class _StopAt(TrainerCallback):
    """A kill right after a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **more):
        control.should_training_stop = state.global_step >= self.step


def test_the_best_model_that_was_never_measured_is_measured_at_the_end(tmp_path):
    callback = ForgettingCallback(every=24, share_of_time=None, page=False, say=lambda line: None)
    best = dict(metric_for_best_model="score", greater_is_better=True, eval_steps=4, save_steps=4)
    run = trainer("plain", tmp_path, [callback], **BEST | best)
    scores = iter([0, 1, 2, 1, 0, 0])
    run.compute_metrics = lambda found: {"score": next(scores)}
    run.train()
    assert run.state.best_global_step == 12
    assert [reading.step for reading in callback.memory.readings] == [12, 24]
    one, last = callback.memory.readings
    assert one.figures["kl"] < last.figures["kl"]
