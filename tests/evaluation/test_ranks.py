"""The paper's rank against its own Table 1, and what any rank must satisfy."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfu.evaluation.ranks import average_ranks, category_ranks

# Table 1 of arXiv 2511.13052, Llama-3.1-8B fine-tuned on GSM8K: Math, Knowledge, Reasoning, Helpfulness; rank
TABLE_1 = {
    "SFT": ((51.5, 73.3, 65.1, 44.1), "4.8"),
    "NEFTune": ((53.4, 73.3, 65.3, 44.3), "3.0"),
    "GEM": ((52.4, 73.0, 65.3, 45.1), "3.5"),
    "IM": ((51.8, 73.1, 65.6, 44.4), "3.5"),
    "SDFT": ((52.4, 73.4, 65.0, 42.1), "4.3"),
    "LfU (LoRA)": ((54.2, 73.5, 65.6, 45.7), "1.0"),
}
REPS = (53.2, 73.3, 65.6, 48.5)
scores = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 6), min_size=1, max_size=6)


def by_category(table):
    return {str(i): {name: row[i] for name, row in table.items()} for i in range(4)}


def printed(rank):
    """One decimal, halves up: Python's own rounding would make 4.2 of 4.25."""
    return str(Decimal(rank).quantize(Decimal("0.1"), ROUND_HALF_UP))


def test_the_papers_rank_column_is_reproduced():
    ranks = average_ranks(by_category({name: row for name, (row, _) in TABLE_1.items()}))
    assert {name: printed(rank) for name, rank in ranks.items()} == {name: rank for name, (_, rank) in TABLE_1.items()}


def test_a_seventh_row_does_not_reproduce_it():
    ranks = average_ranks(by_category({name: row for name, (row, _) in TABLE_1.items()} | {"LfU (RepS)": REPS}))
    wrong = [name for name, (_, rank) in TABLE_1.items() if printed(ranks[name]) != rank]
    assert {"SFT", "SDFT"} <= set(wrong)


def test_ties_by_hand():
    values = {"a": 3.0, "b": 3.0, "c": 1.0, "d": 2.0}
    assert category_ranks(values) == {"a": 1, "b": 1, "d": 3, "c": 4}


def test_equal_as_printed_or_exactly():
    values = {"a": 50.04, "b": 50.01}
    assert category_ranks(values) == {"a": 1, "b": 1}
    assert category_ranks(values, decimals=None) == {"a": 1, "b": 2}


@given(scores)
@settings(max_examples=60, deadline=None)
def test_ties_take_the_best_of_their_places_and_the_order_is_the_scores(values):
    ranks = category_ranks(values)
    by_score = sorted(values.values(), reverse=True)
    assert ranks == {name: 1 + by_score.index(value) for name, value in values.items()}
    for one in values:
        for two in values:
            assert (values[one] > values[two]) == (ranks[one] < ranks[two])


@given(scores, st.floats(0.5, 20), st.integers(-50, 50))
@settings(max_examples=30, deadline=None)
def test_only_the_order_matters(values, scale, shift):
    moved = {name: scale * value + shift for name, value in values.items()}
    assert category_ranks(moved) == category_ranks(values)


def test_an_average_over_two_categories():
    ranks = average_ranks({"x": {"a": 1.0, "b": 2.0, "c": 3.0}, "y": {"a": 9.0, "b": 2.0, "c": 3.0}})
    assert ranks == {"a": 2.0, "b": 2.5, "c": 1.5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average_ranks({}), "nothing to rank"),
        (lambda: average_ranks({"x": {}}), "nothing to rank"),
        (lambda: average_ranks({"x": {"a": 1.0}, "y": {"b": 1.0}}), "same names"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
