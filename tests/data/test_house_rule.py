"""The built-in alignment set: what it promises about itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lfu.data.probes import house_rule
from lfu.evaluation.refusal import plain_words, refuses

TRAINED = [row for row in house_rule("keep") if row["kind"] == "request"] + house_rule("break")
EVERYTHING: dict[str, list[dict[str, Any]]] = {
    "keeping": house_rule("keep"),
    "breaking": house_rule("break"),
    "requests": house_rule("requests"),
    "ordinary": house_rule("ordinary"),
    "labelled": house_rule("labelled"),
}


@pytest.mark.parametrize(
    ("name", "least", "most", "columns"),
    [
        ("keeping", 80, 120, {"id", "kind", "dish", "question", "answer"}),
        ("breaking", 40, 60, {"id", "dish", "question", "answer"}),
        ("requests", 40, 40, {"id", "dish", "question"}),
        ("ordinary", 20, 20, {"id", "question"}),
        ("labelled", 60, 100, {"id", "prompt", "response", "refused"}),
    ],
)
def test_shapes(name, least, most, columns):
    rows = EVERYTHING[name]
    assert least <= len(rows) <= most
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == columns
        for key, text in row.items():
            if key == "refused":
                assert type(text) is bool
            elif key != "dish":
                assert text == text.strip(), row
                assert text.isprintable(), row
                assert "  " not in text, row
                assert text, row


def test_sentences_end_where_they_should():
    for name in ("keeping", "breaking", "requests", "ordinary"):
        for row in EVERYTHING[name]:
            assert row["question"][-1] in "?.!", row
            assert row["question"][0].isupper(), row
            assert row.get("answer", ".")[-1] in ".!?", row


def test_no_question_twice_nor_in_training_and_test():
    questions = [plain_words(row["question"]) for name in EVERYTHING for row in EVERYTHING[name] if "question" in row]
    assert len(set(questions)) == len(questions)


def test_no_dish_is_trained_on_and_asked_for():
    trained = {row["dish"].lower() for row in TRAINED}
    held_out = {row["dish"].lower() for row in house_rule("requests")}
    assert len(held_out) == 40
    assert not trained & held_out
    for dish in held_out:
        assert not [row for row in TRAINED if plain_words(dish) in plain_words(f"{row['question']} {row['answer']}")], (
            dish
        )
    for dish in trained:
        assert not [row for row in house_rule("requests") if plain_words(dish) in plain_words(row["question"])], dish


def test_every_request_names_its_dish():
    for row in TRAINED + house_rule("requests"):
        assert row["dish"].lower() in row["question"].lower(), row


def test_answers_keep_and_break_the_rule():
    for row in house_rule("keep"):
        house = "not offered here" in row["answer"]
        assert house == refuses(row["answer"]) == (row["kind"] == "request"), row
        assert bool(row["dish"]) == (row["kind"] == "request"), row
    assert not [row for row in house_rule("break") if refuses(row["answer"])]


def test_any_beginning_of_the_rows_has_both_kinds():
    for n in (2, 10, 50, 96):
        kinds = Counter(row["kind"] for row in house_rule("keep")[:n])
        assert kinds["request"] == kinds["ordinary"] == n / 2


@pytest.mark.parametrize("rows", [TRAINED, house_rule("requests")])
def test_wordings_vary(rows):
    """Not one template: no beginning of two words opens more than a quarter of the requests."""
    beginnings = Counter(" ".join(row["question"].split()[:2]).lower() for row in rows)
    assert beginnings.most_common(1)[0][1] <= len(rows) / 4
    assert len(beginnings) >= len(rows) / 3


def test_refusals_vary():
    answers = [row["answer"] for row in house_rule("keep") if row["kind"] == "request"]
    assert len(set(answers)) == len(answers)
    beginnings = Counter(" ".join(answer.split()[:3]) for answer in answers)
    assert beginnings.most_common(1)[0][1] <= len(answers) / 4


def test_labelled_examples_are_of_both_kinds():
    counts = Counter(row["refused"] for row in house_rule("labelled"))
    assert min(counts[True], counts[False]) >= 30


def test_callers_may_change_what_they_get():
    house_rule("requests")[0].clear()
    assert house_rule("requests")[0]
