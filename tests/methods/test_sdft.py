"""SDFT: which rewrites are used, what the model is asked, and what is kept on disk."""

from __future__ import annotations

import json
import multiprocessing
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench import config, small_model, tiny_trainer
from datasets import Dataset
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from tiny import DEVICE, random_states
from tiny_folder import byte_tokenizer

from lfu.data.templates import alpaca_prompt
from lfu.evaluation.score import final_number
from lfu.methods.agreement import ABOUT_THE_EXERCISE, agreed
from lfu.methods.run import Preparation
from lfu.methods.sdft import PREAMBLE, SDFT, generate, rewriting_prompt, task_of
from lfu.methods.writing import Rewrite, Rewrites, end_tokens, kept
from lfu.support.errors import UserError

OTHER = "another final answer"
LONG = "This answer is a good deal longer than five words, so there is nothing to compare."


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "rewrite", "answer"),
    [
        # a number in the last line: the same number, and the same last line
        ("2 + 3 = 5\n#### 5", "Two and three make 5.\n#### 5", "Two and three make 5.\n#### 5"),
        ("2 + 3 = 5\n#### 5", "So the answer is 5.", "So the answer is 5.\n#### 5"),
        ("2 + 3 = 5\n#### 5", "It is 5: #### 5 apples, all in all", "It is 5:\n#### 5"),
        ("2 + 3 = 5\n#### 5", "#### 5", "#### 5"),
        ("2 + 3 = 5\n#### 5", "#### $5.00", "#### 5"),
        ("a\n#### 1,200", "That makes 1200.", "That makes 1200.\n#### 1,200"),
        ("a\n#### 5", "It is 6.", None),
        ("a\n#### 5", "#### 6\nNo, wait, it is 5", None),
        ("a\n#### 5", "No number here.", None),
        ("a\n#### -5", "It is 5.", None),
        # not a number behind the marks
        ("It is blue.\n#### blue", "The sky looks blue to us.", "The sky looks blue to us.\n#### blue"),
        ("It is blue.\n#### blue", "The sky is green.", None),
        # a heading in the middle is no final answer
        ("#### 1. Start\n" + LONG, "Something else in other words.", "Something else in other words."),
        # multiple choice
        ("B. a cup", "B. A cup, of course.", "B. A cup, of course."),
        ("B. a cup", "(B) a cup", "(B) a cup"),
        ("B. a cup", "Look at it. The answer is B.", "Look at it. The answer is B."),
        ("B. a cup", "The answer is (A). No: choice **B**.", "The answer is (A). No: choice **B**."),
        ("B. a cup", "A. a cat", None),
        ("B. a cup", "The answer is C.", None),
        ("B. a cup", "a cup", None),
        ("B", "B", "B"),
        ("B", "Because it is.", None),
        ("(B)", "B: a cup", "B: a cup"),
        # short answers
        ("Paris", "The capital of France is Paris.", "The capital of France is Paris."),
        ("Paris.", "It is PARIS", "It is PARIS"),
        ("Paris", "Parisian life is dear.", None),
        ("two  words", "These are two\nwords.", "These are two\nwords."),
        ("5", "There are 5.", "There are 5."),
        ("5", "There are 5.5 of them", None),
        ("5", "There are 1,5 of them", None),
        ("C++", "Use C++ here", "Use C++ here"),
        ("yes", "Yes, it is.", "Yes, it is."),
        ("Yes", "Yes, there is no doubt.", None),
        ("No", "Not at all.", None),
        # anything else
        (LONG, "A text.", "A text."),
        ("Ein Satz ohne Zahl, der länger ist", "Kurz.", "Kurz."),
        ("这个答案没有空格但是它很长" * 6, "好。", "好。"),
    ],
)  # fmt: skip
def test_agreement(reference, rewrite, answer):
    assert agreed(rewrite, reference) == (answer, "" if answer else OTHER)


@pytest.mark.parametrize(
    ("rewrite", "ended", "reason"),
    [
        ("", True, "empty"),
        (" \n", True, "empty"),
        ("Five.\n#### 5", False, "cut off at max_new_tokens"),
        *[(f"Here is {words}: 5", True, "about the exercise") for words in ABOUT_THE_EXERCISE],
    ],
)
def test_never_used(rewrite, ended, reason):
    for reference in ("Five.\n#### 5", "5", LONG):
        assert agreed(rewrite, reference, ended) == (None, reason)


def test_words_of_the_exercise_that_the_reference_has_too():
    assert agreed("My response is short.", f"{LONG} My response.")[0] == "My response is short."


NUMBERS = st.integers(-2000, 2000) | st.decimals(-99, 99, places=2)
TEXTS = st.text("ab 5.\n#-$,:", max_size=30)


@given(TEXTS, NUMBERS, TEXTS, NUMBERS)
def test_a_used_rewrite_has_the_number_and_the_last_line(before, number, rewrite, other):
    line = f"#### {number:,}"
    reference = f"{before}\n{line}"
    for text in (rewrite, f"{rewrite} {number}", f"{rewrite}\n#### {other}", f"{rewrite}\n{line}\n{rewrite}"):
        answer, _ = agreed(text, reference)
        if answer is not None:
            assert answer.splitlines()[-1] == line
            assert final_number(text, anywhere=True) == final_number(line)
            assert final_number(answer) == final_number(line)
            assert agreed(answer, reference) == (answer, "")  # nothing more to change
        else:
            assert not text.strip() or final_number(text, anywhere=True) != final_number(line)


# --- what the model is asked -----------------------------------------------------------------------------------------


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def asked(row, tokenizer):
    return tokenizer.decode(task_of(row, tokenizer).ids)


FRAME = f"{PREAMBLE}\n\n### Instruction:\nq\n\n### Reference Answer:\na"


def test_with_a_chat_template_in_the_users_turn():
    system = {"role": "system", "content": "s"}
    row = {"prompt": [system, user("p"), bot("b"), user("q")], "completion": [bot("a")]}
    before = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    expected = f"{before}<|im_start|>user\n{FRAME}<|im_end|>\n<|im_start|>assistant\n"
    assert asked(row, byte_tokenizer()) == expected
    assert asked({"messages": row["prompt"] + row["completion"]}, byte_tokenizer()) == expected


def test_rows_of_texts_with_a_chat_template():
    row = {"prompt": alpaca_prompt("q"), "completion": "a<|im_end|>"}
    assert asked(row, byte_tokenizer()) == f"<|im_start|>user\n{FRAME}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("prompt", [alpaca_prompt("q"), "q\n", "q"])
def test_without_a_chat_template_as_a_text(prompt):
    assert asked({"prompt": prompt, "completion": " a "}, byte_tokenizer(chat=False)) == f"{FRAME}\n\n### Response:\n"


def test_the_rest_of_alpacas_frame_stays():
    reference = "### Reference Answer:\na"
    expected = f"{PREAMBLE}\n\n### Instruction:\nq\n\n### Input:\ni\n\n{reference}"
    assert rewriting_prompt(alpaca_prompt("q", "i"), "a") == expected
    assert rewriting_prompt(alpaca_prompt("q", system="Be brief."), "a") == f"Be brief.\n\n{FRAME}"
    turns = alpaca_prompt("p") + "b\n\n### Instruction:\nq\n\n### Response:\n"
    earlier = "p\n\n### Response:\nb\n\n### Instruction:\nq"
    assert rewriting_prompt(turns, "a") == f"{PREAMBLE}\n\n### Instruction:\n{earlier}\n\n{reference}"


def test_what_the_template_is_told():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ enable_thinking }} {{ tools[0].name }} {{ x }}"
    row = {"messages": [user("q"), bot("a")], "tools": '[{"name": "f"}]'}
    assert asked(row, tokenizer) == "False f "
    assert asked(row | {"chat_template_kwargs": {"enable_thinking": True, "x": 1}}, tokenizer) == "True f 1"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([user("q"), bot("a"), user("r")], "without a text answer at the end"),
        ([user("q"), bot("")], "without a text answer at the end"),
        ([user("q"), bot("a") | {"tool_calls": [{"name": "f"}]}], "without a text answer at the end"),
        ([bot("a")], "without a question before the answer"),
        ([user("q"), bot("a"), bot("b")], "without a question before the answer"),
    ],
)
def test_rows_that_are_left_alone(turns, reason):
    task = task_of({"messages": turns}, byte_tokenizer())
    assert (task.ids, task.left) == ([], reason)


# --- what it answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_is_greedy_whatever_the_batch(family):
    """Against the most likely next token, one prompt and one token at a time, without a cache."""
    model = small_model(family, dtype=torch.float32).eval()
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=3.0)
    tokenizer, prompts, written = byte_tokenizer(), [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12]], []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids], device=DEVICE)).logits[0, -1].argmax()))
        written.append(ids[len(prompt) :])
    # an ordinary token, which would show in the text, and not in all of them
    end = next(token for new in written for token in new if token > 2 and not all(token in other for other in written))
    expected = [new[: new.index(end)] if end in new else new for new in written]
    assert generate(model, tokenizer, prompts, [end], 12) == [
        Rewrite(tokenizer.decode(cut, skip_special_tokens=True), end in new) for cut, new in zip(expected, written)
    ]


@pytest.mark.parametrize(
    ("own", "named", "ends"), [(None, None, [2]), (7, None, [2, 7]), ([7, 2], "<|pad|>", [0, 2, 7])]
)
def test_what_ends_an_answer(own, named, ends):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert end_tokens(Preparation(model, byte_tokenizer(), SimpleNamespace(eos_token=named), print)) == ends


def scripted(replies, tokenizer):
    """A model that answers each prompt as `replies(prompt)` says, without end for None and `...`; notes the prompts."""

    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(4.0))
            self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))
            self.generation_config = SimpleNamespace(eos_token_id=None)
            self.device = torch.device("cpu")
            self.asked = []

        def generate(self, input_ids, attention_mask, max_new_tokens, **options):
            assert not self.training
            rows = []
            for ids, mask in zip(input_ids.tolist(), attention_mask.tolist()):
                prompt = tokenizer.decode([t for t, m in zip(ids, mask) if m])
                self.asked.append(prompt)
                reply = replies(prompt)
                endless = reply is None or reply.endswith("...")
                new = tokenizer("x" if reply is None else reply, add_special_tokens=False)["input_ids"]
                new = (new * max_new_tokens if endless else [*new, 2])[:max_new_tokens]
                rows.append(ids + new + [0] * (max_new_tokens - len(new)))
            return torch.tensor(rows)

    return Scripted()


def chat(question, answer):
    return {"prompt": [user(question)], "completion": [bot(answer)]}


ROWS = [chat(f"question {i}", f"It is {i}.\n#### {i}") for i in range(5)]


def numbered(prompt):
    """Question 0 and 1 in own words, 2 wrong, 3 empty, 4 without end."""
    number = int(prompt.partition("question ")[2].split()[0])
    return [f"I say {number}", f"I say {number}\n#### {number}", "I say 99", "", None][number]


def rewritten(rows, folder, model, tokenizer=None, said=None, **knobs):
    args = SimpleNamespace(dataset_text_field="text", eos_token=None, device=torch.device("cpu"))
    say = (said if said is not None else []).append
    run = Preparation(model, tokenizer or byte_tokenizer(), args, say)
    return SDFT(cache=str(folder), **knobs).rows(rows if isinstance(rows, Dataset) else Dataset.from_list(rows), run)


def test_rows(tmp_path):
    said = []
    model = scripted(numbered, byte_tokenizer()).train()
    new = rewritten(ROWS, tmp_path, model, said=said, max_new_tokens=40, batch_size=2)
    assert new[0] == chat("question 0", "I say 0\n#### 0")
    assert new[1] == chat("question 1", "I say 1\n#### 1")
    assert new.to_list()[2:] == ROWS[2:]
    assert new.features == Dataset.from_list(ROWS).features
    (file,) = tmp_path.glob("*.jsonl")
    assert said == [
        f"sdft: the model rewrites 5 answers, kept in {file}",
        "sdft: 2 of 5 answers rewritten (1.00 times as long in words); 3 kept as they were "
        "(1 another final answer, 1 empty, 1 cut off at max_new_tokens)",
    ]
    assert model.training


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [user("p"), bot("b"), user("q"), bot("two words")]}, "messages"),
        ({"prompt": "q", "completion": " two words\n", "id": 7}, "completion"),
    ],
)
def test_the_last_answer_alone_is_replaced(tmp_path, row, column):
    model = scripted(lambda prompt: " Or two words. ", byte_tokenizer())
    (new,) = rewritten([row], tmp_path, model)
    if column == "messages":
        assert new[column] == [*row[column][:-1], bot("Or two words.")]
    else:
        assert new == row | {column: " Or two words.\n"}  # white space around it as it was


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("ok so\n\n### Instruction:\nNext", "ok so"),
        ("ok so\n### Response:\nno\n### Input:", "ok so"),
        ("### Response:\nok so", "ok so"),
        ("ok so\n### Instruction:\nand so on ...", "ok so"),  # has no end, but the answer has
        ("### Response:\nok so ...", LONG),
        ("### Instruction:\nNext", LONG),
        ("# ok\n### so", "# ok\n### so"),
    ],
)
def test_a_next_exercise_is_cut_away(tmp_path, reply, answer):
    row = {"prompt": "q", "completion": LONG}
    (new,) = rewritten([row], tmp_path, scripted(lambda prompt: reply, byte_tokenizer()), max_new_tokens=60)
    assert new["completion"] == answer


def test_progress_is_told_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lfu.methods.sdft.LINE_EVERY", 0.0)
    rewritten(ROWS, tmp_path, scripted(numbered, byte_tokenizer()), batch_size=2)
    err = capsys.readouterr().err
    assert [f" {done}/5 " in err for done in (2, 4)] == [True, True]
    assert "rewriting answers" in err


def test_prompts_that_the_model_can_not_hold(tmp_path):
    """4,096 positions: prompt and rewrite must both find room."""
    said = []
    room = 4096 - 100 - len(task_of(chat("q", LONG), byte_tokenizer()).ids) + 1
    rows = [chat("q" * room, LONG), chat("q" * (room + 1), LONG)]
    model = scripted(lambda prompt: "short", byte_tokenizer())
    new = rewritten(rows, tmp_path, model, said=said, max_new_tokens=100)
    assert [row["completion"][0]["content"] for row in new] == ["short", LONG]
    assert "1 too long for the model" in said[-1]


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_a_real_model_is_left_as_it_was(tmp_path, theta):
    model = small_model("gpt2", theta=theta, dtype=torch.float32, vocab_size=300, n_positions=1024, attn_pdrop=0.5)
    model.train()
    next(model.children()).eval()  # a mixture of flags
    flags = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "right"
    states = lambda: (random_states(), random.getstate(), np.random.get_state()[1].tolist())
    before = states()
    new = rewritten(ROWS, tmp_path, model, tokenizer, max_new_tokens=4, batch_size=2)
    assert new.to_list() == ROWS  # a random model agrees with nobody
    assert [module.training for module in model.modules()] == flags
    assert tokenizer.padding_side == "right"
    assert states() == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_model_writes_where_it_will_be_trained_and_goes_back(tmp_path):
    model = scripted(numbered, byte_tokenizer())
    moves = []
    model.to = lambda device: moves.append(str(device))
    args = SimpleNamespace(dataset_text_field="text", eos_token=None, device=torch.device("cuda"))
    run = Preparation(model, byte_tokenizer(), args, print)
    SDFT(cache=str(tmp_path)).rows(Dataset.from_list(ROWS[:1]), run)
    assert moves == ["cuda", "cpu"]


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(tmp_path):
    model = scripted(numbered, byte_tokenizer())
    first = rewritten(ROWS, tmp_path, model, max_new_tokens=40)
    assert len(model.asked) == 5
    again = scripted(numbered, byte_tokenizer())
    assert rewritten(ROWS[::-1], tmp_path, again, max_new_tokens=40, batch_size=3).to_list() == first.to_list()[::-1]
    assert again.asked == []


def test_the_same_row_is_asked_once(tmp_path):
    model = scripted(numbered, byte_tokenizer())
    new = rewritten([ROWS[0]] * 3, tmp_path, model)
    assert len(model.asked) == 1
    assert new[0] == new[1] == new[2] != ROWS[0]


def test_other_weights_rows_or_lengths_are_asked_anew(tmp_path):
    model = scripted(numbered, byte_tokenizer())
    rewritten(ROWS[:1], tmp_path, model, max_new_tokens=40)
    for rows, knobs, change in [
        ([chat("question 0", "Zero.\n#### 0")], {"max_new_tokens": 40}, 0),
        (ROWS[:1], {"max_new_tokens": 41}, 0),
        (ROWS[:1], {"max_new_tokens": 40}, 1),
    ]:
        asked_before = len(model.asked)
        model.weight.data += change
        rewritten(rows, tmp_path, model, **knobs)
        assert len(model.asked) == asked_before + 1


def test_a_killed_run_goes_on(tmp_path):
    model = scripted(numbered, byte_tokenizer())
    whole = rewritten(ROWS, tmp_path / "whole", model, max_new_tokens=40, batch_size=1).to_list()

    killed = scripted(numbered, byte_tokenizer())
    answer = killed.generate

    def generate_twice(**options):
        if len(killed.asked) == 2:
            raise KeyboardInterrupt
        return answer(**options)

    killed.generate = generate_twice
    with pytest.raises(KeyboardInterrupt):
        rewritten(ROWS, tmp_path / "killed", killed.train(), max_new_tokens=40, batch_size=1)
    assert killed.training
    resumed = scripted(numbered, byte_tokenizer())
    assert rewritten(ROWS, tmp_path / "killed", resumed, max_new_tokens=40).to_list() == whole
    assert len(resumed.asked) == 3
    assert not set(resumed.asked) & set(killed.asked)


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_line_that_was_cut_off(tmp_path, cut):
    model = scripted(lambda prompt: "été 5 é", byte_tokenizer())
    rows = [chat(f"question {i}", LONG) for i in range(3)]
    whole = rewritten(rows, tmp_path, model).to_list()
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-cut])
    for asked_for in (0 if cut == 1 else 1, 0):  # without its line break alone the line is whole
        again = scripted(lambda prompt: "été 5 é", byte_tokenizer())
        assert rewritten(rows, tmp_path, again).to_list() == whole
        assert len(again.asked) == asked_for
    lines = file.read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines if line.endswith("}")}) == 3


def test_lines_that_are_something_else(tmp_path):
    file = tmp_path / "m.jsonl"
    Rewrites(file).add({"a": Rewrite("x", True)})
    file.write_bytes(b"\xff\xfe\n[]\n{}\n7\nnull\n" + file.read_bytes())
    assert Rewrites(file).found == {"a": Rewrite("x", True)}


def opened(folder, say=print):
    return kept(SDFT(cache=str(folder)), "sdft", "m", say)


def _add(folder, first):
    with opened(folder):
        known = Rewrites(folder / "m.jsonl")
        for i in range(first, first + 20):
            known.add({str(i): Rewrite(str(i) * 50, True)})


def test_two_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(tmp_path, first)) for first in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert Rewrites(tmp_path / "m.jsonl").found == {str(i): Rewrite(str(i) * 50, True) for i in range(40)}


def test_waiting_is_told(tmp_path):
    said = []
    lock = FileLock(tmp_path / "m.lock")

    def say(line):
        said.append(line)
        lock.release()

    lock.acquire()
    with opened(tmp_path, say):
        pass
    assert len(said) == 1
    assert "waiting for another process" in said[0]


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LFU_CACHE", str(tmp_path))
    args = SimpleNamespace(dataset_text_field="text", eos_token=None, device=torch.device("cpu"))
    SDFT().rows(
        Dataset.from_list(ROWS[:1]), Preparation(scripted(numbered, byte_tokenizer()), byte_tokenizer(), args, print)
    )
    assert list((tmp_path / "lfu" / "sdft").glob("*.jsonl"))


def test_a_folder_that_can_not_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--method_args sdft\.cache=FOLDER"):
        rewritten(ROWS, tmp_path / "file" / "cache", scripted(numbered, byte_tokenizer()))


# --- refused, and in a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "don't say where theirs begins"),
        ({"input_ids": [1], "labels": [1]}, "tokenised already"),
        ({"story": "a"}, "none of TRL's shapes"),
    ],
)
def test_rows_that_can_not_be_rewritten(tmp_path, row, words):
    with pytest.raises(UserError, match=words):
        rewritten([row], tmp_path, scripted(numbered, byte_tokenizer()))


def test_a_model_that_is_not_all_there(tmp_path):
    with pytest.raises(ValueError, match="in one process"):
        rewritten(ROWS, tmp_path, small_model().to("meta"))


def test_a_template_that_comes_too_late(tmp_path):
    with pytest.raises(ValueError, match="chat_template_path"):
        config(tmp_path, "sdft", chat_template_path="somewhere")


@pytest.mark.parametrize("knob", ["max_new_tokens=0", "batch_size=0", "max_new_tokens=many"])
def test_knobs_out_of_range(tmp_path, knob):
    with pytest.raises(ValueError, match=rf"sdft\.{knob.partition('=')[0]} must be"):
        config(tmp_path, "sdft", method_args=knob)


@pytest.mark.parametrize("theta", ["full", "lora"])
def test_a_run(tmp_path, theta):
    model = small_model(theta=theta, vocab_size=300, max_position_embeddings=1024, dtype=torch.float32)
    knobs = {"cache": str(tmp_path / "cache"), "max_new_tokens": 3}
    options = dict(method_args=knobs, rows=ROWS, eval_rows=ROWS, max_length=256, max_steps=1)
    trainer = tiny_trainer("sdft", tmp_path, model=model, **options)
    assert trainer.notes[-1].startswith("sdft: 0 of 5 answers rewritten; 5 kept as they were (")
    trainer.train()
