"""Gained, lost, kept, never: identities that hold whatever the items, and McNemar's test against its definition."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import CHOICES, TEXTS
from tiny import tiny_model

from lfu.evaluation.forgetting import choice_rows, forgetting, mcnemar_p, perplexity_change
from lfu.evaluation.score import TokenScores, multiple_choice, perplexity

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(outcomes)
@settings(max_examples=60, deadline=None)
def test_the_four_counts_add_up(pairs):
    before, after = ([pair[i] for pair in pairs] for i in (0, 1))
    f = forgetting(before, after)
    assert f.kept + f.lost + f.gained + f.never == f.items == len(pairs)
    assert f.kept + f.lost == sum(before) == pytest.approx(f.before * f.items)
    assert f.kept + f.gained == sum(after) == pytest.approx(f.after * f.items)
    assert f.net.value == pytest.approx(f.after - f.before)
    assert f.net.low <= f.net.value + 1e-12
    assert f.net.value <= f.net.high + 1e-12
    turned = forgetting(after, before)
    assert (turned.lost, turned.gained, turned.mcnemar_p) == (f.gained, f.lost, f.mcnemar_p)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_a_model_forgets_nothing_against_itself(right):
    f = forgetting(right, right)
    assert (f.lost, f.gained, f.mcnemar_p) == (0, 0, 1.0)
    assert (f.net.value, f.net.low, f.net.high) == (0, 0, 0)


def test_the_bootstrap_follows_its_seed():
    before, after = [True] * 20 + [False] * 20, [True] * 12 + [False] * 20 + [True] * 8
    assert forgetting(before, after, seed=1) == forgetting(before, after, seed=1)
    before, after = [True, False, True] * 9, [True, True, False] * 9
    assert forgetting(before, after).net.low < 0 < forgetting(before, after).net.high


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (1, 1), (5, 0), (2, 6), (4, 4), (1, 9)])
def test_mcnemar_by_tossing_every_coin(lost, gained):
    """All 2^n ways in which n fair coins may fall; those at least as far from even as the one observed."""
    far = abs(lost - gained)
    ways = [abs(2 * sum(coins) - len(coins)) >= far for coins in product((0, 1), repeat=lost + gained)]
    assert mcnemar_p(lost, gained) == pytest.approx(sum(ways) / len(ways))


def test_mcnemar_of_many_items_does_not_underflow():
    assert 0 < mcnemar_p(400, 600) < 1e-9
    assert 0 <= mcnemar_p(0, 2000) < 1e-300
    assert mcnemar_p(5000, 5000) == 1.0


@pytest.fixture
def llama():
    return tiny_model("llama", dtype=torch.float32, vocab_size=340, max_position_embeddings=256)


def test_identical_models_lose_no_question_and_no_prose(llama, tokenizer):
    one, two = (multiple_choice(llama, tokenizer, CHOICES) for _ in range(2))
    assert forgetting(one.correct, two.correct).net.value == 0
    prose = [perplexity(llama, tokenizer, TEXTS) for _ in range(2)]
    change = perplexity_change(*prose)
    assert (change.value, change.low, change.high) == (0, 0, 0)


def test_what_was_chosen_is_what_was_scored(llama, tokenizer):
    scores = multiple_choice(llama, tokenizer, CHOICES)
    picks = scores.chosen
    assert [pick == row["answer"] for pick, row in zip(picks, CHOICES)] == scores.correct
    for pick, loglik, row in zip(picks, scores.loglik, CHOICES):
        per_character = [value / len(choice) for value, choice in zip(loglik, row["choices"])]
        assert per_character[pick] == max(per_character)
    assert all(0 <= pick < len(row["choices"]) for pick, row in zip(picks, CHOICES))


def test_perplexity_change_is_the_log_of_the_ratio():
    before, after = TokenScores([2.0, 9.0, 4.0], [2, 3, 4]), TokenScores([3.0, 9.0, 5.0], [2, 3, 4])
    change = perplexity_change(before, after)
    assert change.value == pytest.approx(after.mean - before.mean)
    assert 0 <= change.low < change.value < change.high


ARC = {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"}


@pytest.mark.parametrize(
    ("row", "index"),
    [
        ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, 1),
        ({"question": "Which?", "choices": ["a", "b"], "answer": "B"}, 1),
        ({"question": "Which?", "choices": ["a", "b"], "answer": "0"}, 0),
        ({"question": "Which?", "choices": '["a", "b"]', "answer": "b"}, 1),  # as a CSV file has them
        (ARC, 1),
        (ARC | {"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}, 0),
        (ARC | {"answer": None}, 1),
    ],
)
def test_multiple_choice_rows_in_every_shape(row, index):
    (found,) = choice_rows([row])
    assert found["answer"] == index
    assert set(found) == {"question", "choices", "answer"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "row 2: no question"),
        ({"choices": None}, "row 2: no list of at least two choices"),
        ({"choices": ["a"]}, "row 2: no list of at least two choices"),
        ({"choices": ["a", " "]}, "row 2: no list of at least two choices"),
        ({"answer": 2}, "row 2: answer 2 is none of the 2 choices"),
        ({"answer": -1}, "answer -1 is none"),
        ({"answer": "C"}, "answer 'C' is none"),
        ({"answer": None}, "answer None is none"),
    ],
)
def test_rows_that_are_no_multiple_choice(change, message):
    good = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
    with pytest.raises(ValueError, match=message):
        choice_rows([good, good | change])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forgetting([], []), "no values"),
        (lambda: forgetting([True], [True, False]), "same items twice"),
        (lambda: perplexity_change(TokenScores([1.0], [2]), TokenScores([1.0], [3])), "different tokens"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
