"""Bootstrap intervals: coverage on a known distribution, identities, and what can't be averaged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfu.evaluation.intervals import Interval, mean_interval, paired_difference, transitions

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@pytest.mark.parametrize("draw", ["normal", "exponential", "coin"])
def test_coverage_on_a_known_distribution(draw):
    """400 samples of 60 items: the true mean lies inside about 95 % of the 95 % intervals."""
    rng = np.random.default_rng(7)
    samples = {
        "normal": (rng.normal(2.0, 3.0, (400, 60)), 2.0),
        "exponential": (rng.exponential(1.0, (400, 60)), 1.0),
        "coin": ((rng.random((400, 60)) < 0.6).astype(float), 0.6),
    }
    items, truth = samples[draw]
    inside = 0
    for sample in items:
        interval = mean_interval(sample.tolist(), resamples=1000)
        inside += interval.low <= truth <= interval.high
    assert 0.90 <= inside / 400 <= 0.985


def test_width_agrees_with_the_normal_theory():
    sample = np.random.default_rng(1).normal(0, 1, 500)
    interval = mean_interval(sample.tolist())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * sample.std() / 500**0.5, rel=0.05)


def test_pairing_removes_what_the_items_have_in_common():
    rng = np.random.default_rng(2)
    hardness = rng.normal(0, 10, 200)
    ours, theirs = hardness + 1 + rng.normal(0, 0.1, 200), hardness + rng.normal(0, 0.1, 200)
    paired = paired_difference(ours.tolist(), theirs.tolist())
    assert paired.sign == 1
    assert paired.value == pytest.approx(1, abs=0.05)
    assert paired.high - paired.low < 0.1
    assert mean_interval(ours.tolist()).high - mean_interval(ours.tolist()).low > 2


@given(numbers)
@settings(max_examples=30, deadline=None)
def test_identical_inputs_differ_by_nothing(values):
    assert paired_difference(values, values, resamples=50) == Interval(0.0, 0.0, 0.0)


@given(numbers)
@settings(max_examples=30, deadline=None)
def test_the_difference_turns_its_sign_with_the_order(values):
    zeros = [0.0] * len(values)
    one, two = paired_difference(values, zeros, resamples=200), paired_difference(zeros, values, resamples=200)
    assert (one.value, one.low, one.high) == pytest.approx((-two.value, -two.high, -two.low), abs=1e-6)


def test_same_seed_same_interval_and_numpys_own_generator_untouched():
    values = np.random.default_rng(3).normal(size=40).tolist()
    before = np.random.get_state()[1].copy()
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    assert mean_interval(values, seed=5) != mean_interval(values, seed=6)
    assert np.array_equal(before, np.random.get_state()[1])


def test_memory_chunks_change_nothing(monkeypatch):
    values = np.random.default_rng(3).normal(size=40).tolist()
    whole = mean_interval(values)
    monkeypatch.setattr("lfu.evaluation.intervals._CHUNK", 777)
    assert mean_interval(values) == whole


def test_weights_are_the_ratio_of_sums():
    nll, tokens = [6.0, 2.0, 9.0], [3.0, 2.0, 4.0]
    interval = mean_interval([n / t for n, t in zip(nll, tokens)], tokens)
    assert interval.value == pytest.approx(17 / 9)
    assert interval.low >= 1.0
    assert interval.high <= 2.25
    assert mean_interval([1, 2, 4], [5, 5, 5]) == mean_interval([1, 2, 4])


def test_one_item_has_no_width_and_more_confidence_is_wider():
    assert mean_interval([3.5]) == Interval(3.5, 3.5, 3.5)
    values = np.random.default_rng(4).normal(size=50).tolist()
    wide, narrow = mean_interval(values, level=0.99), mean_interval(values, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("low", "high", "sign"), [(0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.1, 0), (0.0, 0.1, 0), (-0.1, 0.0, 0)]
)
def test_sign(low, high, sign):
    assert Interval((low + high) / 2, low, high).sign == sign


def test_transitions():
    before, after = [True, True, True, False, False], [True, False, False, True, False]
    counts = transitions(before, after)
    assert counts == {"kept": 1, "lost": 2, "gained": 1, "never": 1}
    assert counts["gained"] - counts["lost"] == sum(after) - sum(before)
    assert transitions(after, before) == {"kept": 1, "lost": 1, "gained": 2, "never": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "no values"),
        (lambda: mean_interval([1.0, float("nan")]), "value 1 is not"),
        (lambda: mean_interval([1.0], [1.0, 2.0]), "1 values but 2 weights"),
        (lambda: mean_interval([1.0], [0.0]), "above zero"),
        (lambda: mean_interval([1.0], level=1.0), "level"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "same items twice"),
        (lambda: transitions([True], []), "same items twice"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
