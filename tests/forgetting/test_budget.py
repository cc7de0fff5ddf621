"""The budget: what counts as spent, and the sequential test."""

from __future__ import annotations

import math
import random

import pytest

from lfu.forgetting.answers import Answers
from lfu.forgetting.budget import ALPHA, beyond_noise, evidence, parsed, spent
from lfu.forgetting.items import ItemSet

QUESTIONS = ItemSet("questions", True, [{"question": str(i), "choices": ["a", "b"], "answer": 0} for i in range(300)])
PROSE = ItemSet("prose", False, [str(i) for i in range(40)])


def answered(right: list[bool]) -> Answers:
    return Answers(chosen={"questions": [0 if one else 1 for one in right]})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, {}),
        (0.02, {"questions": 0.02, "prose": 0.02}),
        ("0.02", {"questions": 0.02, "prose": 0.02}),
        ("prose=0.05", {"prose": 0.05}),
        ("questions=0.01, law=0.1", {"questions": 0.01, "law": 0.1}),
        ({"prose": 1}, {"prose": 1.0}),
    ],
)
def test_a_budget_is_a_number_or_names_its_measures(given, wanted):
    assert parsed(given, ["questions", "prose", "law"]) == wanted


@pytest.mark.parametrize("given", [0, -1, math.nan, "much", "prose=", {"poetry": 0.1}, {"prose": None}])
def test_a_bad_budget_is_refused_by_name(given):
    with pytest.raises(ValueError, match="forgetting budget"):
        parsed(given, ["questions", "prose"])


def test_spent_is_net_of_what_was_gained():
    before = answered([True] * 100 + [False] * 200)
    after = answered([False] * 10 + [True] * 90 + [True] * 4 + [False] * 196)
    assert spent(before, after, QUESTIONS) == pytest.approx(0.06)
    texts = Answers(nll={"prose": [2.0] * 40}), Answers(nll={"prose": [2.1] * 40})
    assert spent(*texts, PROSE) == pytest.approx(0.1)


def test_a_lot_forgotten_is_beyond_the_noise_and_a_little_is_not():
    before = answered([True] * 150 + [False] * 150)
    lost = lambda n: answered([False] * n + [True] * (150 - n) + [False] * 150)
    shown = [beyond_noise(evidence(before, lost(n), QUESTIONS, 0.02), 1, 2) for n in (0, 4, 30)]
    assert shown == [False, False, True]
    rng = random.Random(0)
    base = [rng.uniform(2, 4) for _ in range(40)]
    risen = lambda by: Answers(nll={"prose": [x + by + rng.gauss(0, 0.01) for x in base]})
    shown = [
        beyond_noise(evidence(Answers(nll={"prose": base}), risen(by), PROSE, 0.02), 1, 2) for by in (0, 0.02, 0.06)
    ]
    assert shown == [False, False, True]


@pytest.mark.parametrize("kind", ["questions", "prose"])
def test_at_the_budget_itself_few_runs_are_stopped(kind):
    """The spending is exactly the budget in truth: over 10 readings at most ALPHA of the runs are ever stopped."""
    rng, budget, stopped, runs = random.Random(1), 0.05, 0, 100
    for _ in range(runs):
        shown = False
        for reading in range(1, 11):
            if kind == "questions":
                was = [rng.random() < 0.5 for _ in range(300)]
                now = [(x and rng.random() >= 0.10) or (not x and rng.random() < 0.05) for x in was]
                log_e = evidence(answered(was), answered(now), QUESTIONS, budget)
            else:
                base = [rng.uniform(2, 4) for _ in range(40)]
                risen = [x + budget + rng.gauss(0, 0.05) for x in base]
                log_e = evidence(Answers(nll={"prose": base}), Answers(nll={"prose": risen}), PROSE, budget)
            shown |= beyond_noise(log_e, reading, 1)
        stopped += shown
    assert stopped / runs <= ALPHA


def test_sixteen_texts_are_enough_at_the_tenth_reading():
    before, after = (Answers(nll={"prose": [level + i / 100 for i in range(16)]}) for level in (2.0, 3.0))
    assert beyond_noise(evidence(before, after, PROSE, 0.02), 10, 2)


def test_a_later_reading_needs_more_evidence():
    assert beyond_noise(4.0, 1, 1)
    assert not beyond_noise(4.0, 3, 1)
    assert not beyond_noise(-1.0, 1, 1)
