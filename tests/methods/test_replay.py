"""Replay: how many rows, which ones, and in what shape."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from bench import config, small_model, tiny_trainer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_folder import byte_tokenizer

from lfu.data.templates import alpaca_prompt
from lfu.methods import methods_of
from lfu.methods.replay import Replay, draw, replayed, spread
from lfu.methods.run import Preparation
from lfu.support.errors import UserError

SIZES = st.integers(1, 400)


def chat(number, answer="yes"):
    return {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def text(number, prompt="question {}\n"):
    return {"prompt": prompt.format(number), "completion": "yes"}


def pool(folder, rows):
    path = folder / "general.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def general(count):
    return [{"question": f"general {i}", "answer": f"answer {i}"} for i in range(count)]


def mixed(rows, file, *, seed=7, tokenizer=None, said=None, **knobs):
    args = SimpleNamespace(seed=seed, dataset_text_field=knobs.pop("text_field", "text"))
    say = (said if said is not None else []).append
    run = Preparation(None, tokenizer or byte_tokenizer(), args, say)
    return Replay(data=file, **knobs).rows(Dataset.from_list(rows), run)


def question(row):
    return row["prompt"][0]["content"]


# --- numbers -------------------------------------------------------------------------------------------------------


@given(SIZES, st.floats(0.001, 0.99))
def test_the_share_is_as_near_as_whole_rows_allow(rows, share):
    def distance(count):
        return abs(count - share * (rows + count)) / (1 - share)  # rows that are missing or too many

    count = replayed(rows, share)
    assert count >= 1
    assert distance(count) <= 0.5 + 1e-6 or count == 1
    assert distance(count) <= distance(count + 1) + 1e-6


@pytest.mark.parametrize(
    ("rows", "share", "count"), [(95, 0.05, 5), (100, 0.05, 5), (99, 0.01, 1), (3, 0.01, 1), (7, 0.5, 7), (1, 0.99, 99)]
)
def test_shares_by_hand(rows, share, count):
    assert replayed(rows, share) == count


@given(SIZES, SIZES, st.integers(0, 2**32))
def test_every_row_once_before_any_comes_again(size, count, seed):
    drawn = draw(size, count, seed)
    assert len(drawn) == count
    for start in range(0, count, size):
        turn = drawn[start : start + size]
        assert len(set(turn)) == len(turn)
        assert set(turn) <= set(range(size))
    assert drawn == draw(size, count, seed)


def test_another_seed_draws_other_rows():
    assert draw(1000, 20, 1) != draw(1000, 20, 2)


@given(SIZES, SIZES)
def test_spread_evenly(rows, extra):
    order = spread(rows, extra)
    assert sorted(order) == list(range(rows + extra))
    assert [n for n in order if n < rows] == list(range(rows))
    for end in range(1, rows + extra):  # every beginning holds its part of the extra rows, to one row and a bit
        assert abs(sum(n >= rows for n in order[:end]) - end * extra / (rows + extra)) <= 1.5


# --- rows ----------------------------------------------------------------------------------------------------------


def test_the_mixture(tmp_path):
    said = []
    file = pool(tmp_path, general(30))
    rows = [chat(i) for i in range(20)]
    new = mixed(rows, file, share=0.2, said=said)
    own = [row for row in new if question(row).startswith("question")]
    drawn = [row for row in new if question(row).startswith("general")]
    assert own == rows  # all of them, unchanged, in their order
    assert len(drawn) == 5  # 5 of 25 are 0.2
    assert len({question(row) for row in drawn}) == 5
    for row in drawn:
        number = question(row).removeprefix("general ")
        assert row["completion"] == [{"role": "assistant", "content": f"answer {number}"}]
    assert said == [f"replay: 5 rows drawn from the 30 of {file}, mixed into 20 training rows (20.0 % of the mixture)"]
    assert new.to_list() == mixed(rows, file, share=0.2).to_list()
    assert new.to_list() != mixed(rows, file, share=0.2, seed=8).to_list()


def test_what_is_left_out_of_the_general_rows_is_told(tmp_path):
    said: list[str] = []
    file = pool(tmp_path, [row | {"history": "h"} for row in general(9)])
    mixed([chat(i) for i in range(4)], file, share=0.5, said=said)
    assert said[0].startswith(f"replay: {file}: warning: column 'history' of the data is left out")


def test_rows_that_run_out_are_taken_again_and_it_is_told(tmp_path):
    said = []
    new = mixed([chat(i) for i in range(5)], pool(tmp_path, general(2)), share=0.5, said=said)
    counts = [sum(question(row) == f"general {i}" for row in new) for i in range(2)]
    assert sorted(counts) == [2, 3]
    assert "each 2.5 times" in said[0]


@pytest.mark.parametrize("prompt", [alpaca_prompt("question {}"), "question {}\n"])
def test_general_rows_get_the_prompt_of_the_training_rows(tmp_path, prompt):
    new = mixed([text(i, prompt) for i in range(4)], pool(tmp_path, general(9)), share=0.5)
    frame = prompt.replace("question {}", "{}")
    added = [row for row in new if "general" in row["prompt"]]
    assert len(added) == 4
    for row in added:
        number = row["completion"].removeprefix("answer ")
        assert row["prompt"] == frame.format(f"general {number}")


def test_conversations_are_joined_or_cut(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    new = mixed([{"messages": turns}], pool(tmp_path, general(1)), share=0.5)
    assert new[1]["messages"] == [
        {"role": "user", "content": "general 0"},
        {"role": "assistant", "content": "answer 0"},
    ]
    new = mixed([chat(1)], pool(tmp_path, [{"messages": turns}]), share=0.5)
    assert new[1] == {"prompt": turns[:1], "completion": turns[1:]}


def test_plain_texts_in_their_column(tmp_path):
    new = mixed([{"body": "one"}], pool(tmp_path, [{"text": "two"}]), share=0.5, text_field="body")
    assert sorted(row["body"] for row in new) == ["one", "two"]


def test_the_split_is_a_knob(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "from train", "answer": "a"}))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "from test", "answer": "a"}))
    new = mixed([chat(1)], str(tmp_path), share=0.5, split="test")
    assert question(new[1]) == "from test"


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "other", "words"),
    [
        ({"input_ids": [1, 2], "labels": [1, 2]}, {"text": "x"}, "tokenised already"),
        ({"image": "x", "prompt": "a", "completion": "b"}, {"text": "x"}, "images"),
        ({"story": "x"}, {"text": "x"}, "none of TRL's shapes"),
        (text(1), {"text": "x"}, "bring both into one shape"),
        ({"text": "x"}, {"question": "q", "answer": "a"}, "bring both into one shape"),
        (chat(1), {"prompt": "q", "completion": "a"}, "don't fit into one table"),
        (chat(1), {"messages": [{"role": "user", "content": "x"}]}, "no answer"),
    ],
)
def test_rows_that_do_not_go_together(tmp_path, row, other, words):
    with pytest.raises(UserError, match=words):
        mixed([row], pool(tmp_path, [other]))


def test_what_the_chat_template_is_told_stays_with_its_row(tmp_path):
    own = chat(1) | {"chat_template_kwargs": {"x": 1}, "tools": [{"name": "f", "parameters": {"a": None}}]}
    new = mixed([own], pool(tmp_path, [{"question": "q", "answer": "a"}]), share=0.5)
    (kept,) = [row for row in new if row["tools"]]
    assert kept == own
    assert [row["chat_template_kwargs"] for row in new if not row["tools"]] == [None]


def test_no_such_data(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        mixed([chat(1)], str(tmp_path / "nothing.jsonl"))


def test_streamed_rows_are_refused(tmp_path):
    rows = Dataset.from_list([chat(1)]).to_iterable_dataset()
    with pytest.raises(ValueError, match="without streaming"):
        Replay(data="x").rows(rows, Preparation(None, None, SimpleNamespace(seed=1, dataset_text_field="text"), print))


def test_without_data_the_config_says_how_to_give_it(tmp_path):
    with pytest.raises(ValueError, match=r"--method_args replay\.data=FILE"):
        config(tmp_path, "replay")


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan", "all"])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match=r"replay\.share"):
        methods_of("replay", f"replay.data=x,share={share}")


# --- in a run ------------------------------------------------------------------------------------------------------


def test_a_run(tmp_path):
    rows = [chat(i) for i in range(6)]
    args = {"data": pool(tmp_path, general(9)), "share": 0.25}
    model = small_model(vocab_size=300, max_position_embeddings=256, dtype=torch.float32)
    trainer = tiny_trainer(
        "replay", tmp_path, model=model, rows=rows, eval_rows=rows, method_args=args, max_length=256, max_steps=1
    )
    assert len(trainer.train_dataset) == 8
    assert len(trainer.eval_dataset) == 6
    assert any("replay: 2 rows" in note for note in trainer.notes)
    trainer.train()
