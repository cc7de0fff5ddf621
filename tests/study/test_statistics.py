"""Differences over seeds and items: exact where nothing differs, right where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfu.study import statistics
from lfu.study.statistics import Sample, difference

VALUES = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


def by_few_draws(ours, theirs):
    """The difference where every draw must come to the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 50)
        return difference(ours, theirs)


@given(VALUES, st.integers(1, 3))
def test_the_same_runs_differ_by_nothing(values, seeds):
    runs = [Sample.of([v + seed for v in values]) for seed in range(seeds)]
    found = by_few_draws(runs, runs)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


@given(VALUES, st.floats(0.1, 3))
def test_a_shift_of_every_item_is_certain(values, shift):
    found = by_few_draws([Sample.of([v + shift for v in values])], [Sample.of(values)])
    assert found.low == pytest.approx(shift)
    assert found.high == pytest.approx(shift)


def test_weights_are_those_of_the_items():
    sample = Sample.of([1.0, 4.0], [3.0, 1.0])  # 3 tokens at 1 nat, one at 4
    assert sample.value == pytest.approx(7 / 4)


def test_a_spread_over_templates():
    """Two templates, accuracies 1/2 and 1 on two rows: their standard deviation (n - 1)."""
    sample = Sample(np.array([[1.0, 0.0], [1.0, 1.0]]), np.ones((2, 2)), "std")
    assert sample.value == pytest.approx(np.std([0.5, 1.0], ddof=1))


def test_one_of_the_others_stands_for_all_seeds():
    base = Sample.of([1.0, 2.0])
    found = difference([Sample.of([2.0, 3.0]), Sample.of([4.0, 5.0])], [base])
    assert found.value == pytest.approx(2.0)
    assert found.low < 2.0 < found.high  # the seeds differ


def test_seeds_widen_what_items_alone_would_say():
    """No item differs from another; only the seeds do, by +1 and -1. Student's t with one degree of freedom is 12.7."""
    zero = [Sample.of([0.0] * 30)] * 2
    found = difference([Sample.of([1.0] * 30), Sample.of([-1.0] * 30)], zero)
    assert found.value == 0.0
    assert found.low == pytest.approx(-12.7, rel=0.1)
    assert found.high == pytest.approx(12.7, rel=0.1)


@pytest.mark.parametrize("of_seeds", [0.05, 0.3], ids=["items' noise", "seeds' noise"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds, of_seeds, monkeypatch):
    """Effects drawn anew for seeds, items and both at once, whichever is the larger."""
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    rng = np.random.default_rng(0)
    truth, items, trials, hits = 0.3, 60, 400, 0
    theirs = [Sample.of(np.zeros(items))]
    for trial in range(trials):
        of_item = rng.normal(0, 0.5, items)
        ours = [Sample.of(truth + rng.normal(0, of_seeds) + of_item + rng.normal(0, 0.1, items)) for _ in range(seeds)]
        found = difference(ours, theirs, seed=trial)
        hits += found.low <= truth <= found.high
    assert hits / trials >= 0.93


def test_what_can_not_be_paired():
    one, two = Sample.of([1.0, 2.0]), Sample.of([1.0])
    for ours, theirs in (([], []), ([one], [two]), ([one, one, one], [one, one])):
        with pytest.raises(ValueError, match="the same seeds and items"):
            difference(ours, theirs)
