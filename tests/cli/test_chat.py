"""`lfu chat`: answers to what is piped in or typed, tuned and untouched beside each other."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lfu.cli import chat, main
from lfu.support.flags import read


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """An adapter that changes every answer."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    shutil.copy(Path(model) / "tokenizer.json", folder)
    shutil.copy(Path(model) / "tokenizer_config.json", folder)
    shutil.copy(Path(model) / "chat_template.jinja", folder)
    return str(folder)


@pytest.fixture
def talk(monkeypatch, capsys):
    """Pipes lines into `lfu chat`; gives what it printed, line by line."""

    def run(lines, *argv, code=0):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", *argv, "--max_new_tokens", "6"]) == code
        told = capsys.readouterr()
        return told.out if code == 0 else told.err

    return run


def one(argv):
    """The speaker that the flags ask for."""
    return chat.speakers(read(chat.Chat, "lfu chat", "", argv))[0]


def answers(out, name):
    return [part.partition("\n")[0] for part in out.split(f"{name}> ")[1:]]


def test_piped_through_a_real_pipe(model, tmp_path):
    command = ["python", "-m", "lfu.cli", "chat", model, "--max_new_tokens", "4"]
    told = forked.run(command, tmp_path, given="hello\n\nagain\n")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("you> ") == told.stdout.count("model> ") == 2
    assert "Traceback" not in told.stderr


def test_the_untouched_answer_is_the_base_models(talk, model, adapter):
    both = talk(["hello", "and now?"], adapter, "--beside")
    tuned, untouched = (answers(both, name) for name in ("tuned", "untouched"))
    assert len(tuned) == len(untouched) == 2
    assert tuned != untouched
    assert untouched == answers(talk(["hello", "and now?"], model), "model")
    assert tuned == answers(talk(["hello", "and now?"], adapter), "model")
    assert both == talk(["hello", "and now?"], adapter, "--beside", model)
    assert untouched == answers(talk(["hello", "and now?"], model, "--beside", model), "untouched")


def test_an_answer_ends_where_tokenizer_or_template_end_it(model):
    """A base model's settings for generation name its end of text alone, and its template writes another."""
    speaker, seen = one([model]), {}
    speaker.model.generation_config.eos_token_id = 7
    speaker.tokenizer.chat_template = speaker.tokenizer.chat_template.replace("<|im_end|>", "<|pad|>")
    speaker.model.generate = lambda **how: seen.update(how) or how["input_ids"]
    assert speaker.answer("hello", print)
    assert seen["eos_token_id"] == [0, 2, 7]


def test_commands(talk, model):
    out = talk(["hello", "/new", "hello", "/what", "/quit", "never asked"], model)
    first, second = answers(out, "model")
    assert first == second  # a new conversation knows nothing of the one before
    assert "(a new conversation)" in out
    assert chat.HELP in out
    assert "never asked" not in out


def test_ctrl_c_stops_one_answer(talk, model, monkeypatch):
    generate, count = chat.Speaker._generate, []

    def stopped(self, ids, show):
        count.append(len(ids))
        if len(count) == 1:
            show("half an ans")
            raise KeyboardInterrupt
        generate(self, ids, show)

    monkeypatch.setattr(chat.Speaker, "_generate", stopped)
    out = talk(["one", "two"], model)
    assert "model> half an ans (stopped)\n" in out
    assert len(answers(out, "model")) == 2
    assert count[1] > count[0]  # the conversation goes on, with the half answer in it


def test_drawn_answers_follow_the_seed(talk, model):
    draw = lambda seed: talk(["hello"], model, "--temperature", "5", "--seed", seed)
    assert draw("1") == draw("1") != draw("2")


def test_a_conversation_longer_than_the_model_can_read_forgets_its_beginning(model):
    speaker = one([model, "--max_new_tokens", "100", "--system", "Be brief."])
    for number in range(30):
        speaker.turns.append({"role": "user", "content": f"question {number} " + "x" * 100})
        speaker.turns.append({"role": "assistant", "content": "y" * 50})
    speaker.turns.append({"role": "user", "content": "the last one"})
    text = speaker.tokenizer.decode(speaker.ids())
    assert len(speaker.ids()) <= 2048 - 100
    assert "Be brief." in text
    assert "the last one" in text
    assert "question 0 " not in text
    assert "question 29 " in text


def test_a_model_without_chat_template_is_asked_as_it_was_trained(tmp_path, talk):
    from tiny_folder import save_model

    bare = save_model(tmp_path / "bare", chat=False)
    speaker = one([bare])
    speaker.turns = [{"role": "user", "content": "Why?"}]
    assert "### Instruction:\nWhy?" in speaker.tokenizer.decode(speaker.ids())
    speaker.turns += [{"role": "assistant", "content": "So."}, {"role": "user", "content": "How?"}]
    assert "So.<|im_end|>\n\n### Instruction:\nHow?" in speaker.tokenizer.decode(speaker.ids())  # as rows are written
    assert len(answers(talk(["hello"], bare), "model")) == 1
    assert "--template alpaca" in talk([], bare, "--template", "chat", code=2)


def test_a_model_is_asked_in_the_template_that_is_given(model):
    for template, start in (("none", "Why?\n"), ("alpaca", "Below is an instruction")):
        speaker = one([model, "--template", template])
        speaker.turns = [{"role": "user", "content": "Why?"}]
        assert speaker.tokenizer.decode(speaker.ids()).startswith(start)


def test_side_by_side_in_a_terminal_of_80_columns(talk, adapter, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    out = talk(["hello"], adapter, "--beside")
    last = out[out.rindex("tuned") :]
    assert "untouched" in last
    assert "┃" in last or "│" in last


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--beside"], "is a full model and names no base"),
        (["--temperature", "-1"], "argument --temperature: must be a finite number from 0"),
        (["--seed", "3"], "--seed is for drawn answers"),
    ],
)
def test_bad_flags_are_one_line(talk, model, argv, told):
    err = talk([], model, *argv, code=2)
    assert told in err
    assert err.count("\n") == 1


def test_no_such_model_is_one_line(talk):
    assert "does not exist" in talk([], "./nowhere", code=2)
