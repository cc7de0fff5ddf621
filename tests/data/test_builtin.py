"""Behaviour of the built-in data: generated word problems and the probe sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, get_args

import pytest

from lfu.data.probes import general_knowledge, plain_text
from lfu.data.word_problems import PEOPLE, SHAPES, TEMPLATES, word_problems

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
PINNED_TRAIN = {
    "question": "Leo has collected 32 badges. Ivan has collected 11 badges more than Leo. "
    "They put both collections on one big table. How many badges lie on the table?",
    "answer": "Ivan has 32 + 11 = 43 badges.\nTogether they have 32 + 43 = 75 badges.\n#### 75",
}
PINNED_TEST = {
    "question": "Lena needs 41 points to win a cup at the fair. So far she has hit 7 targets worth 4 points apiece. "
    "How many points are missing?",
    "answer": "The targets gave 7 x 4 = 28 points.\nSo 41 - 28 = 13 points are missing.\n#### 13",
}
STEP = re.compile(r"(\d+) ([-+x/]) (\d+) = (\d+)")


@pytest.fixture(scope="module", params=SPLITS)
def rows(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """The first 1000 problems of a split, the number within which no repeats are promised."""
    return word_problems(request.param, 1000)


def _compute(a: int, op: str, b: int) -> int:
    """``a op b``; fails the test where a division leaves a rest."""
    if op == "/":
        assert a % b == 0, f"{a} / {b} is not exact"
        return a // b
    return {"+": a + b, "-": a - b, "x": a * b}[op]


def _sentences(text: str) -> list[str]:
    """The sentences of a text, across its lines."""
    return [s for s in re.split(r"(?<=[.?!])\s+", text) if not s.startswith("####")]


def _raw_patterns(split: Split) -> set[str]:
    """Every sentence of the split's templates, questions and answers, with the slots blanked."""
    texts = (t for template in TEMPLATES[split] for t in (template.scene, *template.work))
    return {re.sub(r"\{\w+\}", "_", s).lower() for text in texts for s in _sentences(text)}


def _rendered_patterns(split: Split, n: int) -> set[str]:
    """Every sentence of ``n`` problems with numbers, names, pronouns and slot words blanked.

    Words of all slots of both splits are blanked, so a fixed word here cannot hide a slot word there.
    """
    words = {w for ts in TEMPLATES.values() for t in ts for choices in t.words.values() for w in choices}
    masked = sorted(words | {name for name, _ in PEOPLE} | {"he", "she"}, key=len, reverse=True)
    mask = re.compile(r"\b(\d+|" + "|".join(map(re.escape, masked)) + r")\b", re.IGNORECASE)
    texts = (text for row in word_problems(split, n) for text in row.values())
    return {mask.sub("_", s).lower() for text in texts for s in _sentences(text)}


def _wrong_choices(row: dict[str, Any]) -> Iterator[str]:
    yield from (c for i, c in enumerate(row["choices"]) if i != row["answer"])


# --- word problems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_same_arguments_give_the_same_rows(split: Split) -> None:
    assert word_problems(split, 60, seed=3) == word_problems(split, 60, seed=3)
    assert word_problems(split, 60, seed=3) != word_problems(split, 60, seed=4)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_of_a_smaller_n_are_a_prefix(split: Split) -> None:
    rows = word_problems(split, 300)
    for n in (1, 17, 299):
        assert word_problems(split, n) == rows[:n]


def test_first_rows_stay_what_they_are() -> None:
    """Published scores refer to these rows: a change of generator must be seen, in any process and on any machine."""
    train, test = word_problems("train", 1)[0], word_problems("test", 1)[0]
    assert train == PINNED_TRAIN
    assert test == PINNED_TEST


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_no_question_twice_nor_in_both_splits(seed: int) -> None:
    train = [row["question"] for row in word_problems("train", 1000, seed)]
    test = [row["question"] for row in word_problems("test", 1000, seed)]
    assert len(set(train)) == len(train) == 1000
    assert len(set(test)) == len(test) == 1000
    assert not set(train) & set(test)


def test_worked_arithmetic_is_right(rows: list[dict[str, str]]) -> None:
    for row in rows:
        *work, last = row["answer"].split("\n")
        steps = STEP.findall("\n".join(work))
        assert 1 <= len(steps) <= 3, row
        # Each "=" belongs to a step the pattern has read, so that none goes unchecked.
        assert row["answer"].count("=") == len(steps), row
        for a, op, b, result in steps:
            assert _compute(int(a), op, int(b)) == int(result), row
        match = re.fullmatch(r"#### (\d+)", last)
        assert match, row
        assert match[1] == steps[-1][3], row


def test_given_numbers_of_a_step_come_from_the_question_or_a_step_before(rows: list[dict[str, str]]) -> None:
    for row in rows:
        # 2 is also in "half of" and "there and back".
        known = set(re.findall(r"\d+", row["question"])) | {"2"}
        for a, _, b, result in STEP.findall(row["answer"]):
            assert {a, b} <= known, row
            known.add(result)


def test_every_number_of_the_question_is_used(rows: list[dict[str, str]]) -> None:
    for row in rows:
        used = {number for a, _, b, _ in STEP.findall(row["answer"]) for number in (a, b)}
        assert set(re.findall(r"\d+", row["question"])) <= used, row


def test_nouns_can_all_be_plural(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert all(int(number) >= 2 for text in row.values() for number in re.findall(r"\d+", text)), row


def test_texts_are_clean_and_short(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert row.keys() == {"question", "answer"}
        assert 20 <= len(row["question"].split()) <= 45, row
        assert len(row["answer"].split()) < 35, row
        assert row["question"].endswith("?")
        for text in row.values():
            assert not re.search(r"[{}<>]|  ", text), row
            assert all(s[0].isupper() for s in _sentences(text)), row


@pytest.mark.parametrize(("split", "at_least"), [("train", 20), ("test", 12)])
def test_all_templates_are_used_about_equally(split: Split, at_least: int) -> None:
    assert len(TEMPLATES[split]) >= at_least
    # The end of the question tells the templates apart.
    mask = re.compile(r"\{\w+\}|\d+")
    tails = {mask.sub("_", _sentences(t.scene)[-1]) for t in TEMPLATES[split]}
    assert len(tails) == len(TEMPLATES[split])
    seen = Counter(len(STEP.findall(row["answer"])) for row in word_problems(split, 10 * len(TEMPLATES[split])))
    expected = Counter({steps: 10 * count for steps, count in _step_counts(split).items()})
    assert seen == expected


def _step_counts(split: Split) -> Counter[int]:
    """How many templates have how many steps."""
    return Counter("".join(t.work).count("=") for t in TEMPLATES[split])


def test_test_asks_for_no_skill_that_train_does_not_show() -> None:
    assert {t.shape for t in TEMPLATES["test"]} <= {t.shape for t in TEMPLATES["train"]}


def test_splits_share_no_sentence_of_their_templates() -> None:
    assert not _raw_patterns("train") & _raw_patterns("test")


def test_splits_share_no_sentence_once_rendered() -> None:
    assert not _rendered_patterns("train", 2000) & _rendered_patterns("test", 2000)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="validation"):
        word_problems("validation", 3)  # type: ignore[arg-type]
    for n in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            word_problems("train", n)


def test_a_split_that_runs_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One template with few numbers and no slot words runs dry: an error, not an endless loop."""
    few = next(t for t in TEMPLATES["train"] if t.shape == SHAPES["sub_div"])
    monkeypatch.setitem(TEMPLATES, "train", (type(few)("Some eggs: {c}.", few.work, few.shape),))
    with pytest.raises(ValueError, match="only 7 distinct"):
        word_problems("train", 100)


# --- probe sets ----------------------------------------------------------------------------------------------------


def test_general_knowledge_rows_are_valid() -> None:
    rows = general_knowledge()
    assert len(rows) >= 200
    for row in rows:
        assert row.keys() == {"id", "category", "question", "choices", "answer"}
        assert row["question"].endswith("?")
        assert row["category"]
        assert len(row["choices"]) == 4
        assert len({choice.lower() for choice in row["choices"]}) == 4, row
        assert all(1 <= len(choice.split()) <= 3 and choice == choice.strip() for choice in row["choices"]), row
        assert row["answer"] in range(4)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["question"].lower() for row in rows}) == len(rows)


def test_the_position_of_the_right_choice_tells_nothing() -> None:
    counts = Counter(row["answer"] for row in general_knowledge())
    assert max(counts[i] for i in range(4)) - min(counts[i] for i in range(4)) <= 2


def test_the_length_of_the_right_choice_tells_nothing() -> None:
    rows = general_knowledge()
    longest = sum(len(r["choices"][r["answer"]]) > max(map(len, _wrong_choices(r))) for r in rows)
    shortest = sum(len(r["choices"][r["answer"]]) < min(map(len, _wrong_choices(r))) for r in rows)
    # By chance at most a quarter; ties make it less.
    assert longest / len(rows) < 0.25
    assert shortest / len(rows) < 0.25


def test_general_knowledge_covers_several_categories() -> None:
    counts = Counter(row["category"] for row in general_knowledge())
    assert len(counts) >= 5
    assert min(counts.values()) >= 20


def test_plain_text_passages_are_valid() -> None:
    rows = plain_text()
    assert len(rows) == 40
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == 40
    for row in rows:
        assert row.keys() == {"id", "text"}
        assert 50 <= len(row["text"].split()) <= 90, row["id"]
        assert row["text"].isprintable(), row["id"]
        assert "  " not in row["text"], row["id"]


def test_callers_may_change_what_they_get() -> None:
    general_knowledge()[0]["choices"].clear()
    assert len(general_knowledge()[0]["choices"]) == 4
