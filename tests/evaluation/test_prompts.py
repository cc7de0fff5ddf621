"""Templates and their spread: known by construction, and against the plain scores under the same prompt."""

from __future__ import annotations

import statistics

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from questions import CHOICES, QUESTIONS
from tiny import tiny_model
from tiny_folder import AROUND, base_tokenizer, byte_tokenizer

from lfu import LfUConfig
from lfu.data.learned import tokenised
from lfu.data.templates import alpaca_prompt, to_training_rows
from lfu.evaluation import score
from lfu.evaluation.pieces import answer_pieces, chat_pair, render_of
from lfu.evaluation.prompts import (
    TASKS,
    TemplateScores,
    check_templates,
    fill,
    headline,
    prompt_scores,
    read_templates,
    shipped_templates,
    spread,
    spread_difference,
    task_of,
)
from lfu.evaluation.score import answer_nll, exact_match
from lfu.support.errors import UserError

TWO = {"bare": "{question}", "loud": "Hear! {question}"}
FREE = [{"question": "Say hi", "answer": "hi"}, {"question": "Say ho", "answer": "ho, ho"}]


@pytest.fixture
def llama():
    return tiny_model("llama", dtype=torch.float32, vocab_size=340, max_position_embeddings=2048)


def scores(*correct: list[bool]) -> dict[str, TemplateScores]:
    return {
        f"t{i}": TemplateScores([float(not c) for c in row], [1] * len(row), row, [""] * len(row))
        for i, row in enumerate(correct)
    }


# --- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_shipped_templates_are_many_different_and_filled_in(task):
    templates = shipped_templates(task)
    assert len(templates) >= 6
    row = {"question": "How {many}?", "choices": ["one", "t{w}o"], "answer": 0}
    filled = [fill(text, row) for text in templates.values()]
    assert len(set(filled)) == len(filled)
    for text in filled:
        assert text.count("How {many}?") == 1  # braces in the data are no fields
        assert ("- one\n- t{w}o" in text) == (task == "multiple_choice")
    check_templates(templates, "")
    shipped_templates(task).clear()
    assert shipped_templates(task) == templates


def test_shipped_word_problem_templates_ask_for_the_marked_number():
    bare, *others = shipped_templates("word_problems").values()
    assert bare == "{question}"
    assert all("####" in text for text in others)


def test_templates_of_the_users(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text('a: "{question}"\nb: "Braces {{so}}: {question} {choices}"\n')
    templates = read_templates(file)
    assert fill(templates["b"], {"question": "Q"}) == "Braces {so}: Q "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read"),
        ("a: [", "not valid YAML"),
        ("- one\n- two", "must hold lines of the form"),
        ("", "must hold lines of the form"),
        ('a: "{question}"', "holds 1; how wording matters takes two"),
        ('a: "{question}"\nb: 3', "'b': is no text but of type int"),
        ('a: "{question}"\nb: "{questoin}"', "'b': unknown field {questoin}"),
        ('a: "{question}"\nb: "{question.__class__}"', "unknown field"),
        ('a: "{question}"\nb: "{question} {}"', "unknown field {}"),
        ('a: "{question}"\nb: "{question!r}"', "unknown field {with a conversion}"),
        ('a: "{question}"\nb: "no field"', "'b': has no {question} in it"),
        ('a: "{question}"\nb: "{question} {"', "write {{ and }} for braces"),
    ],
)
def test_templates_that_are_none(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises((ValueError, UserError), match=message.replace("{", r"\{").replace("}", r"\}")):
        read_templates(file)


def test_yaml_that_would_run_code_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text('a: !!python/object/apply:os.system ["true"]\nb: "{question}"')
    with pytest.raises(UserError, match="not valid YAML"):
        read_templates(file)


def test_task_of():
    assert task_of(CHOICES) == "multiple_choice"
    assert task_of(QUESTIONS) == "word_problems"
    assert task_of([*QUESTIONS, *FREE]) == "instruction"


@pytest.mark.parametrize(
    ("template", "chat", "prompt", "answer"),
    [
        ("auto", True, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>\n"),
        ("chat", True, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>\n"),
        ("auto", False, alpaca_prompt("Q"), "A<|im_end|>"),
        ("alpaca", True, alpaca_prompt("Q"), "A<|im_end|>"),
        ("none", True, "Q\n", "A<|im_end|>"),
    ],
)
def test_questions_are_put_as_in_training(template, chat, prompt, answer):
    tokenizer = byte_tokenizer(chat=chat)
    assert render_of(tokenizer, template)(tokenizer, {"question": "Q", "answer": "A"})[:2] == (prompt, answer)


@pytest.mark.parametrize("template", ["alpaca", "none"])
@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_a_base_model_is_scored_on_the_tokens_that_it_is_trained_on(template, kind, end, tmp_path):
    tokenizer = base_tokenizer(kind)
    row = {"question": "How many?", "answer": f"Four.{end}"}
    rows = to_training_rows(Dataset.from_list([row]), template=template, tokenizer=tokenizer)
    (trained,) = tokenised(rows, tokenizer, LfUConfig(str(tmp_path), use_cpu=True))
    (piece,) = answer_pieces(tokenizer, [row], render=render_of(tokenizer, template))
    assert piece.ids == trained["input_ids"]
    assert piece.tokens == sum(label != -100 for label in trained["labels"])
    assert piece.ids.count(tokenizer.eos_token_id) == 1


def test_a_choice_is_scored_where_the_answer_stands():
    """Behind the empty reasoning that a template puts in front of every answer, which no generation prompt has."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{% if message.role == 'assistant' %}<think></think>{% endif %}{{ message.content }}",
    )
    row = {"question": "Which?", "choices": ["think", "m"], "answer": 0}
    model = tiny_model(vocab_size=len(tokenizer))
    found = prompt_scores(model, tokenizer, [row], {"bare": "{question}"})["bare"]
    prompt, answer = chat_pair(tokenizer, {"question": "Which?", "answer": "think"})
    head, end = "<think></think>", "<|im_end|>\n"
    assert answer == f"{head}think{end}"
    scores = score.answer_nll(model, tokenizer, [row], render=lambda tok, row: (prompt + head, "think"))
    assert found.nll == pytest.approx(scores.nll, rel=1e-12)


# --- scores --------------------------------------------------------------------------------------------------------


def test_word_problems_score_as_the_plain_functions_on_the_filled_in_questions(llama, tokenizer):
    ticks: list[int] = []
    found = prompt_scores(llama, tokenizer, QUESTIONS, TWO, max_new_tokens=4, progress=ticks.append)
    assert sum(ticks) == 2 * len(QUESTIONS)
    for name, opening in (("bare", ""), ("loud", "Hear! ")):
        asked = [row | {"question": opening + row["question"]} for row in QUESTIONS]
        assert found[name].nll == answer_nll(llama, tokenizer, asked).nll
        assert found[name].text == exact_match(llama, tokenizer, asked, max_new_tokens=4, batch_size=8).text
    assert found["bare"].nll != found["loud"].nll


def test_a_last_number_counts_where_there_is_no_mark(llama, tokenizer, monkeypatch):
    said = iter(["so #### 5", "about 1193", "4", "3 x 4 = 12", "none", *["0"] * 5])
    monkeypatch.setattr(score, "continuations", lambda model, tok, prompts, *more: [next(said) for _ in prompts])
    found = prompt_scores(llama, tokenizer, QUESTIONS, TWO)
    assert found["bare"].correct == [True, True, False, True, False]
    assert found["loud"].correct == [False, False, False, False, True]


def test_choices_are_scored_by_their_text(llama, tokenizer):
    templates = {"with": "{question}\n{choices}", "without": "{question}"}
    found = prompt_scores(llama, tokenizer, CHOICES, templates)
    for name, template in templates.items():
        for i, row in enumerate(CHOICES):
            prompt = chat_pair(tokenizer, {"question": fill(template, row), "answer": "x"})[0]
            nll = answer_nll(
                llama, tokenizer, row["choices"], render=lambda tok, choice, prompt=prompt: (prompt, choice)
            ).nll
            per_character = [value / len(choice) for value, choice in zip(nll, row["choices"])]
            best = per_character.index(min(per_character))
            assert found[name].text[i] == row["choices"][best]
            assert found[name].correct[i] == (best == row["answer"])
            assert found[name].nll[i] == pytest.approx(nll[row["answer"]], rel=1e-4)
            assert found[name].tokens[i] == len(row["choices"][row["answer"]])  # one a byte: no end of turn


def test_free_answers_have_no_accuracy(llama, tokenizer):
    found = prompt_scores(llama, tokenizer, FREE, TWO)
    assert found["bare"].correct is None
    assert found["bare"].nll == answer_nll(llama, tokenizer, FREE).nll
    assert headline([found]) == "nll"
    for call in (lambda: headline([found], "accuracy"), lambda: spread(found, "accuracy")):
        with pytest.raises(ValueError, match="no accuracy"):
            call()


# --- spread --------------------------------------------------------------------------------------------------------


def test_templates_that_change_nothing_have_no_spread():
    same = scores(*[[True, False, True, True, False, True]] * 5)
    for metric in ("accuracy", "nll"):
        s = spread(same, metric)
        assert (s.std.value, s.std.low, s.std.high) == pytest.approx((0, 0, 0), abs=1e-12)
        assert s.worst.value == s.mean.value
        assert s.mean.low < s.mean.value < s.mean.high
        other = spread_difference(same, same, metric)
        assert {(i.value, i.low, i.high) for i in other.values()} == {(0, 0, 0)}


@given(st.integers(2, 6).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=2)))
@settings(max_examples=30, deadline=None)
def test_spread_is_what_statistics_says(rows):
    s = spread(scores(*rows), "accuracy", resamples=50)
    shares = [sum(row) / len(row) for row in rows]
    assert list(s.templates.values()) == pytest.approx(shares)
    assert s.mean.value == pytest.approx(statistics.mean(shares))
    assert s.std.value == pytest.approx(statistics.stdev(shares))
    assert s.worst.value == pytest.approx(min(shares)) == pytest.approx(s.templates[s.worst_template])


def test_nll_is_per_token_and_its_worst_is_the_highest():
    s = spread(
        {"short": TemplateScores([2.0, 1.0], [2, 1], None, []), "long": TemplateScores([9.0, 1.0], [4, 1], None, [])},
        "nll",
    )
    assert s.templates == {"short": 1.0, "long": 2.0}
    assert (s.worst.value, s.worst_template) == (2.0, "long")
    assert s.std.value == pytest.approx(statistics.stdev([1.0, 2.0]))


def test_a_model_that_one_wording_breaks_is_told_from_one_that_none_does():
    steady = scores(*[[True] * 40] * 5)
    brittle = scores(*[[True] * 40] * 4, [False] * 30 + [True] * 10)
    s = spread(brittle, "accuracy")
    assert (s.worst.value, s.worst_template) == (0.25, "t4")
    difference = spread_difference(brittle, steady, "accuracy")
    assert difference["std"].sign == 1
    assert difference["mean"].sign == -1
    assert difference["std"].low > 0.2


def test_headline():
    low, high = scores(*[[False] * 100] * 2), scores([True] * 9 + [False] * 91, [True] + [False] * 99)
    assert headline([low, low]) == "nll"
    assert headline([low, high]) == "accuracy"  # one model at 5 % is enough
    assert headline([low], "accuracy") == "accuracy"
    assert headline([high], "nll") == "nll"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: prompt_scores(m, t, [], TWO), "no rows"),
        (lambda m, t: prompt_scores(m, t, QUESTIONS, {}), "no templates"),
        (lambda m, t: prompt_scores(m, t, QUESTIONS, {"a": "{other}"}), "template 'a': unknown field"),
        (lambda m, t: shipped_templates("poetry"), "unknown task 'poetry'"),
        (lambda m, t: headline([], "speed"), "unknown metric"),
        (lambda m, t: spread(scores([True]), "accuracy"), "two or more"),
        (lambda m, t: spread_difference(scores([True], [True]), scores([True]), "nll"), "same templates"),
        (lambda m, t: spread_difference(scores([True] * 2), scores([True]), "nll"), "same templates"),
        (lambda m, t: render_of(byte_tokenizer(chat=False), "chat"), "no chat template"),
        (lambda m, t: render_of(t, "fancy"), "unknown template"),
    ],
)
def test_mistakes(llama, tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(llama, tokenizer)
