"""Which rows train, choose and test; and rows as they are scored: token for token as the trainer sees them."""

from __future__ import annotations

from datetime import date
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from tiny_folder import AROUND, base_tokenizer, byte_tokenizer
from trl import SFTConfig, SFTTrainer

from lfu import LfUConfig
from lfu.data.columns import as_dataset, rows_of
from lfu.data.learned import tokenised
from lfu.data.load import load_rows
from lfu.data.templates import to_training_rows
from lfu.data.turns import shared_start
from lfu.evaluation.pieces import answer_pieces, encode
from lfu.study.measure import _loss, _wrap
from lfu.study.rows import chooses, pair_of, questions, retention, split, write_rows
from lfu.support.errors import UserError

SHAPE = partial(to_training_rows, template="auto", system=None, tokenizer=byte_tokenizer())
PLAIN = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(40)]
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


@given(
    st.integers(40, 300), st.integers(1, 5), st.none() | st.integers(4, 8), st.none() | st.integers(4, 8), st.booleans()
)
def test_a_split_is_a_partition(count, repeats, validation_rows, test_rows, given_test):
    """No row is in two parts, none appears from nowhere, and only held-out rows' doubles are lost."""
    rows = [{"n": i % count} for i in range(count * repeats)]
    test = [{"n": i} for i in range(3, 9)] if given_test else None
    parts = split(
        rows, None, test, validation_rows=validation_rows, test_rows=None if given_test else test_rows
    )  # fmt: skip
    values = {name: {row["n"] for row in getattr(parts, name)} for name in ("train", "validation", "test")}
    assert not values["train"] & values["validation"]
    assert not values["train"] & values["test"]
    assert not values["validation"] & values["test"]
    assert values["train"] | values["validation"] | values["test"] == {row["n"] for row in rows} | values["test"]
    if validation_rows:
        assert len(parts.validation) == validation_rows
    assert parts == split(
        rows, None, test, validation_rows=validation_rows, test_rows=None if given_test else test_rows
    )  # fmt: skip


def test_a_splits_sizes_and_what_is_said():
    parts = split(PLAIN, None, None)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (24, 8, 8)
    assert parts.said == ["8 of 40 rows were split off for test.", "8 of 40 rows were split off for validation."]
    # the order of the training rows is the user's
    assert parts.train == [row for row in PLAIN if row in parts.train]
    assert len(split([{"n": i} for i in range(5000)], None, None).test) == 200


def test_rows_that_are_held_out_are_not_trained_on():
    parts = split(PLAIN, PLAIN[:6], PLAIN[4:10])
    assert parts.test == PLAIN[4:10]
    assert parts.validation == PLAIN[:4]
    assert parts.train == PLAIN[10:]
    assert "10 training rows are left out" in " ".join(parts.said)


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        (10, {}, "too few to split off 8 for test and 8 for validation"),
        (40, {"validation_rows": 20, "test_rows": 15}, "too few"),
        (40, {"validation_rows": 1}, "1 validation rows are left"),
    ],
)
def test_too_few_rows(rows, more, says):
    with pytest.raises(UserError, match=says):
        split(PLAIN[:rows], None, None, **more)


def test_a_third_chooses():
    assert sum(chooses(300)) == 100
    assert chooses(4) == [True, False, False, True]


@pytest.mark.parametrize(
    ("row", "chat", "template"),
    [
        (PLAIN[0], True, "auto"),
        (PLAIN[0], False, "auto"),
        (PLAIN[0], True, "none"),
        ({"messages": CONVERSATION}, True, "auto"),
        ({"prompt": "Say a", "completion": " and b"}, False, "auto"),
        ({"question": "Which?", "choices": ["x", "yy"], "answer": 1}, True, "auto"),
    ],
)
def test_a_row_is_scored_as_it_is_trained_on(row, chat, template, tmp_path):
    """The trainer's own token ids, and the same tokens counted as the answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(chat=chat)
    rows = to_training_rows(Dataset.from_list([row] * 2), template=template, tokenizer=tokenizer)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    options = {"report_to": "none", "max_steps": 1, "bf16": False, "max_length": None}
    trainer = SFTTrainer(
        LlamaForCausalLM(config), SFTConfig(str(tmp_path), **options), train_dataset=rows, processing_class=tokenizer
    )
    trained = trainer.train_dataset[0]
    prompt, answer, *plain = pair_of(tokenizer, rows[0])
    assert plain == ([] if chat and template == "auto" else [True])
    ids = encode(tokenizer, prompt + answer)
    assert ids == list(trained["input_ids"])
    if "completion_mask" in trained:
        assert shared_start(encode(tokenizer, prompt), ids) == list(trained["completion_mask"]).index(1)


TURN = "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
THINKS = {  # templates whose generation prompt opens a reasoning -> what stands in front of an answer without one
    "none": ("{% for m in messages %}" + TURN + "{% endfor %}" + OPENS, "assistant\n", ""),
    "empty": ("{% for m in messages %}" + TURN.replace("{{ m.content", "{% if m.role == 'assistant' %}<think></think>"
              "{% endif %}{{ m.content") + "{% endfor %}" + OPENS, "assistant\n<think>", "</think>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", THINKS)
@pytest.mark.parametrize("answer", ["Yes.", "<b>Yes.</b>"])
def test_an_answer_without_reasoning_is_scored_as_the_template_writes_it(kind, answer, tmp_path):
    """Though the generation prompt opens a reasoning; as in training, if that does not begin as the answer does."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, end, head = THINKS[kind]
    rows = to_training_rows(as_dataset([{"conversations": ["One?", "1", "Two?", answer]}]), tokenizer=tokenizer)
    prompt, scored = pair_of(tokenizer, rows[0])
    assert prompt.endswith(f"Two?<|im_end|>\n<|im_start|>{end}")
    assert scored == f"{head}{answer}<|im_end|>\n"
    (piece,) = answer_pieces(tokenizer, list(rows), render=pair_of)
    if answer == "Yes.":
        (trained,) = tokenised(rows, tokenizer, LfUConfig(str(tmp_path), use_cpu=True, assistant_only_loss=True))
        assert piece.ids == trained["input_ids"]
        assert piece.start == 1 + max(place for place, label in enumerate(trained["labels"]) if label == -100)


def test_a_template_that_rewrites_what_was_said_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + THINKS["none"][0]
    rows = to_training_rows(as_dataset([{"conversations": ["One?", "1"]}]), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="doesn't keep the prompt in front of the answer"):
        pair_of(tokenizer, rows[0])


TALKS: list[dict[str, Any]] = [
    {"question": "One?", "answer": " Yes.\n"},
    {"instruction": "Name it", "input": "the sea", "output": "Sea", "system": "Be short."},
    {"conversations": ["One?", "Yes.", "Two?", "No."]},
    {"prompt": "Say a", "completion": " and b"},
    {"prompt": "Say a:", "completion": " b<|im_end|>"},
    {"question": "Which?", "choices": ["x", "yy"], "answer": 1},
]


@pytest.mark.parametrize("row", TALKS, ids=lambda row: next(iter(row)))
@pytest.mark.parametrize("template", ["alpaca", "none"])
@pytest.mark.parametrize("kind", AROUND)
def test_every_base_model_is_scored_on_its_training_tokens(row, template, kind, tmp_path):
    tokenizer = base_tokenizer(kind)
    rows = to_training_rows(as_dataset([row]), template=template, tokenizer=tokenizer)
    (trained,) = tokenised(rows, tokenizer, LfUConfig(str(tmp_path), use_cpu=True))
    (piece,) = answer_pieces(tokenizer, list(rows), render=pair_of)
    assert piece.ids == trained["input_ids"]
    last = max(place for place, label in enumerate(trained["labels"]) if label == -100)
    assert piece.start == last + 1


def test_an_answer_that_is_not_learned_is_not_scored():
    talk = [turn | ({"weight": 0} if turn["content"] == "No." else {}) for turn in CONVERSATION]
    tokenizer = byte_tokenizer()
    (row,) = to_training_rows(as_dataset([{"messages": talk}]), tokenizer=tokenizer)
    assert pair_of(tokenizer, row) == pair_of(tokenizer, {"messages": CONVERSATION[:3]})


def test_questions_that_can_be_reworded():
    assert questions(PLAIN[:2]) == PLAIN[:2]
    dolly = {"instruction": "Name it", "input": "the sea", "output": "Sea"}
    assert questions([dolly]) == [{"question": "Name it\n\nthe sea", "answer": "Sea"}]
    choice = {"question": "Which?", "choices": ["x", "y"], "answer": 1}
    assert questions([choice]) == [choice]
    one_turn = {"messages": CONVERSATION[:3], "chat_template_kwargs": {"enable_thinking": False}}
    beside = {"system": "Be short.", "chat_template_kwargs": {"enable_thinking": False}}
    assert questions([one_turn]) == [{"question": "One?", "answer": "Yes."} | beside]
    assert questions([PLAIN[0] | {"system": "Be short."}]) == [PLAIN[0] | {"system": "Be short."}]
    several = {"conversations": ["One?", "Yes.", "Two?", "No."]}
    for row in ({"messages": CONVERSATION}, several, {"prompt": "a", "completion": "b"}, {"text": "a"}):
        assert questions([row]) is None


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
@pytest.mark.parametrize("more", [{}, {"system": "Be short."}, {"tools": [{"name": "f"}]}])
def test_the_bare_wording_is_the_training_row(more, template):
    """The first of the shipped wordings is the question itself: asked with all that stands beside it in training."""
    tokenizer, row = byte_tokenizer(), PLAIN[0] | more
    (trained,) = to_training_rows(as_dataset([row]), template=template, tokenizer=tokenizer)
    exam: Any = SimpleNamespace(template=template, system=None)
    assert questions([row]) == [row]
    assert _wrap([row], tokenizer, exam)(tokenizer, row) == pair_of(tokenizer, trained)


def test_rows_are_written_as_they_were_read(tmp_path):
    """Half a surrogate pair in a column that nobody uses is no reason to stop."""
    rows = [{"question": "é\u2028", "answer": "1.50", "junk": "\ud800"}, {"question": "q", "answer": 3.5, "junk": None}]
    write_rows(rows, tmp_path / "rows.jsonl")
    assert list(load_rows(str(tmp_path / "rows.jsonl"))) == rows


def test_rows_of_a_typed_data_set_are_written_as_lfu_train_reads_them(tmp_path):
    """Arrow fills the keys that an object lacks with null, and a 32-bit 0.1 is longer in Python."""
    features = Features(
        {"answer": Value("float32"), "tools": [{"a": Value("int64"), "b": Value("int64")}], "day": Value("date32")}
    )
    row = {"answer": 0.1, "tools": [{"a": 1}], "day": date(2026, 1, 2)}
    write_rows(rows_of(Dataset.from_list([row], features=features)), tmp_path / "rows.jsonl")
    assert list(load_rows(str(tmp_path / "rows.jsonl"))) == [row | {"day": "2026-01-02"}]


def test_a_text_row_is_scored_with_its_end():
    """Training ends it, so that a text of one token can be scored, too."""
    model, tokenizer = tiny_model(vocab_size=259), byte_tokenizer()
    exam: Any = SimpleNamespace(batch_size=2)
    found = _loss(exam, [{"text": "abcd"}, {"text": "abcd<|im_end|>"}, {"text": "a"}], model, tokenizer, lambda n: None)
    assert found["tokens"] == [4, 4, 1]
    assert found["nll"][0] == pytest.approx(found["nll"][1])
    assert _loss(exam, ["abcd"], model, tokenizer, lambda n: None)["tokens"] == [3]  # prose is none of the rows


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"question": "Which?", "choices": ["x", "y"], "answer": "B"}, "choice"),
        ({"text": "A passage of prose."}, "text"),
        (PLAIN[0], "answer"),
    ],
)
def test_what_should_be_kept(row, kind):
    kept = retention("mine", Dataset.from_list([row] * 3), "mine.jsonl", SHAPE)
    assert kept.kind == kind
    assert len(kept.rows) == 3


def test_retention_rows_of_no_known_shape():
    with pytest.raises(UserError, match=r"--retention mine\.jsonl: .*makes? no training rows"):
        retention("m", Dataset.from_list([{"a": "b"}]), "mine.jsonl", SHAPE)
