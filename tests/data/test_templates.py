"""Every accepted shape of data, in each template, as TRL sees it; and what is said about the rest."""

from __future__ import annotations

import string

import pytest
from datasets import Dataset, Features, Value
from tiny_folder import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from lfu.data.learned import tokenised
from lfu.data.lengths import about_lengths, lengths
from lfu.data.templates import ALPACA, alpaca_prompt, to_training_rows
from lfu.support.errors import UserError


def convert(row, template="chat", system=None, chat=True):
    rows = row if isinstance(row, list) else [row]
    return to_training_rows(
        Dataset.from_list(rows), template=template, tokenizer=byte_tokenizer(chat=chat), system=system
    )[0]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ARC = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2", "id": "7"}
CHAT = {
    "question": ({"question": "q", "answer": "2+2=<<2+2=4>>4\n#### 4"}, ["q"], "2+2=<<2+2=4>>4\n#### 4"),
    "instruction": ({"instruction": "q", "output": "a"}, ["q"], "a"),
    "instruction with input": ({"instruction": "q", "input": "i", "output": "a"}, ["q\n\ni"], "a"),
    "dolly's own names": ({"instruction": "q", "context": "i", "response": "a", "category": "c"}, ["q\n\ni"], "a"),
    "arc of the hub": (ARC, ["Q?\nA. x\nB. y"], "B. y"),
    "arc by letter": (ARC | {"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}, None, "A. x"),
    "choices and text": ({"question": "Q?", "choices": ["x", "y"], "answer": "y"}, ["Q?\nA. x\nB. y"], "B. y"),
    "numbers and index": ({"question": "Q?", "choices": [1, 0], "answer": 1}, ["Q?\nA. 1\nB. 0"], "B. 0"),
    "choices as JSON": ({"question": "Q?", "choices": '["x", "y"]', "answer": "B"}, ["Q?\nA. x\nB. y"], "B. y"),
    "choices with their labels": (
        {"question": "Q?", "choices": [{"label": "1", "text": "x"}, {"label": "2", "text": "y"}], "answerKey": "1"},
        None,
        "A. x",
    ),
    "choices as they are spelled": (
        {"question": "Q?", "choices": "[1.50, 2]", "answer": "A"},
        ["Q?\nA. 1.50\nB. 2"],
        "A. 1.50",
    ),
    "choices and index": ({"question": "Q?", "choices": ["x", "y"], "answer": 0}, ["Q?\nA. x\nB. y"], "A. x"),
}
TALK = {
    "lima": ({"conversations": ["q", "a", "r", "b"], "source": "s"}, ["q", "a", "r", "b"]),
    "lima, question last": ({"conversations": ["q", "a", "r"]}, ["q", "a"]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q", "a"]),
    "alpaca with history": ({"instruction": "r", "output": "b", "history": [["q", "a"]]}, ["q", "a", "r", "b"]),
}


@pytest.mark.parametrize("shape", CHAT)
def test_shapes_as_chat(shape):
    row, prompt, completion = CHAT[shape]
    converted = convert(row)
    assert converted["completion"] == [assistant(completion)]
    if prompt:
        assert [message["content"] for message in converted["prompt"]] == prompt
        assert converted["prompt"][-1]["role"] == "user"
    assert set(converted) == {"prompt", "completion"}


def test_a_32_bit_number_of_a_data_set_is_spelled_as_it_was():
    features = Features({"question": Value("string"), "answer": Value("float32")})
    rows = Dataset.from_list([{"question": "q", "answer": 0.1}], features=features)
    (made,) = to_training_rows(rows, template="none", tokenizer=byte_tokenizer())
    assert made["completion"] == "0.1"


def test_prompt_and_completion_may_be_conversations_as_json():
    """As in a CSV file, where they would be learned as JSON."""
    row = {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"from": "gpt", "value": 1.50}]'}
    assert convert(row) == {"prompt": [user("q")], "completion": [assistant("1.50")]}
    texts = {"prompt": '[{"x": 1}, ', "completion": '{"role": "user"}]'}
    assert convert(texts) == texts


@pytest.mark.parametrize("shape", TALK)
def test_conversations_as_chat(shape):
    row, turns = TALK[shape]
    converted = convert(row)
    assert converted == {"messages": [(user, assistant)[i % 2](text) for i, text in enumerate(turns)]}


@pytest.mark.parametrize("shape", [*CHAT, *TALK])
def test_shapes_as_alpaca(shape):
    row, *_, completion = (CHAT | TALK)[shape]
    converted = convert(row, "alpaca")
    assert converted["completion"] == (completion if shape in CHAT else completion[-1])
    assert converted["prompt"].startswith("Below is an instruction")
    assert converted["prompt"].endswith("### Response:\n")


def test_alpaca_with_and_without_input():
    assert alpaca_prompt("q") == f"{ALPACA}\n\n### Instruction:\nq\n\n### Response:\n"
    with_input = alpaca_prompt("q", "i")
    assert "paired with an input" in with_input
    assert with_input.endswith("### Instruction:\nq\n\n### Input:\ni\n\n### Response:\n")
    assert convert({"instruction": "q", "input": " ", "output": "a"}, "alpaca")["prompt"] == alpaca_prompt("q")


def test_a_system_message():
    row = {"question": "q", "answer": "a"}
    assert convert(row, system="Be brief.")["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert convert(row, "alpaca", system="Be brief.")["prompt"].startswith("Be brief.\n\n### Instruction")
    for blank in ("", " ", None):  # a row's empty one is none, and does not hide the other
        other = convert(row | {"system": blank, "system_prompt": "S"}, system="Be brief.")
        assert other["prompt"][0]["content"] == "S"
        assert convert(row | {"system": blank}, system="Be brief.")["prompt"][0]["content"] == "Be brief."
    with pytest.raises(UserError, match="system message can't be added"):
        convert({"prompt": "q", "completion": "a"}, system="Be brief.")


def test_auto_follows_the_tokenizer():
    row = {"question": "q", "answer": "a"}
    assert convert(row, "auto") == convert(row, "chat")
    assert convert(row, "auto", chat=False) == convert(row, "alpaca")
    assert convert(row, "none") == {"prompt": "q\n", "completion": "a"}
    with pytest.raises(UserError, match="no chat template"):
        convert(row, "chat", chat=False)
    with pytest.raises(UserError, match="unknown template 'vicuna'"):
        convert(row, "vicuna")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("q"), assistant("a")]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [user("q")], "completion": [assistant("a")]},
        {"text": "anything"},
    ],
)
def test_trls_own_shapes_stay(row):
    assert convert(row | {"id": 3, "question": "not looked at"} if "text" not in row else row) == row


@pytest.mark.parametrize(
    "bad",
    [{"question": "q", "answer": blank} for blank in (None, "", "  \n")]
    + [
        {"messages": [user("q")]},
        {"messages": []},
        {"messages": [user("q"), assistant("  ")]},
        {"prompt": "q", "completion": ""},
        {"instruction": "q", "output": None},
        {"question": "q", "choices": ["x", "y"], "answer": None},
    ],
)
def test_rows_without_an_answer_are_counted_and_named(bad):
    good = {
        "messages": [user("q"), assistant("a")], "question": "q", "answer": "a", "prompt": "q", "completion": "a",
        "instruction": "q", "output": "a", "choices": ["x", "y"],
    }  # fmt: skip
    good = {key: good[key] for key in bad} | ({"answer": 1} if "choices" in bad else {})
    with pytest.raises(UserError, match=r"2 of 3 data rows have no answer in column .* \(row 2, 3\)"):
        convert([good, bad, bad])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instructions": "q", "output": "a"}, "'instructions': Did you mean instruction"),
        ({"question": "q", "anwser": "a"}, "'anwser': Did you mean answer"),
        ({"question": "q", "choices": ["x", "y"], "answer": 2}, "row 1: answer 2 is none of the 2 choices"),
        ({"question": "q", "choices": ["x", "y"], "answer": "Z"}, "row 1: answer 'Z' is none"),
        ({"question": "q", "choices": ["x", "y"], "answer": "AB"}, "row 1: answer 'AB' is none"),
        ({"question": "q", "choices": ["x"], "answer": 0}, "row 1: no list of at least two choices"),
        ({"question": "q", "choices": ["1", "2"], "answer": "1"}, "row 1: answer '1' fits two choices"),
        ({"question": "q", "choices": ["B", "A"], "answer": "A"}, "row 1: answer 'A' fits two choices"),
        ({"foo": 1}, "the data has the column foo, which makes no training rows. Needed: messages; prompt and"),
        ({"prompt": "q"}, "column prompt, .*Beside 'prompt' there is no column 'completion'. Needed: "),
        ({"prompt": "q", "response": "a"}, "Beside 'response' there is no column 'instruction'"),
        ({"instruction": "q"}, "no column 'output' or 'response'"),
        (
            dict.fromkeys(string.ascii_letters, 1),
            "columns a, b, c, d, e, f, g, h, 44 more, which make no training rows",
        ),
        ({"conversations": ["q"]}, "row 1: needs at least a question and an answer"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "row 1: turns must alternate"),
        (
            {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]},
            "turn 1 has role 'human'.* 'user'",
        ),
        ({"messages": [user("q"), {"role": "Assistant", "content": "a"}]}, "turn 2 has role 'Assistant'.* 'assistant'"),
        (
            {"messages": [user("q"), {"role": "bot", "content": "a"}, user("r"), assistant("b")]},
            "turn 2 has role 'bot'",
        ),
        ({"messages": [user("q"), assistant("a"), {"role": "critic", "content": "b"}]}, "turn 3 has role 'critic'"),
        ({"prompt": [user("q"), assistant(" "), user("r")], "completion": [assistant("a")]}, r"turn 2 \(assistant\)"),
        (
            {"messages": [user([{"type": "text", "text": "q"}, {"type": "text", "value": "r"}])]},
            "a part",
        ),
        ({"messages": [user("q"), assistant("a") | {"weight": 1, "train": False}]}, "weight and train say different"),
        (
            {"messages": [user("q"), assistant("a")], "chat_template_kwargs": {"tokenize": False}},
            "has 'tokenize', which",
        ),
        ({"messages": '[{"role": "user", "content": "q", "content": "r"}]'}, "the key 'content' twice"),
        ({"question": "q", "answer": float("inf")}, "row 1: column 'answer' is a number that is too large"),
        (
            {"question": "q", "answer": "a", "system": "S", "system_prompt": "T"},
            "row 1: the row has two system messages, in columns 'system' and 'system_prompt'",
        ),
        ({"text": " "}, "no text in column 'text'"),
        ({"question": " ", "answer": "a"}, "no text in column 'question'"),
    ],
)
def test_other_rows_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        convert(row)


def test_conversations_need_a_chat_template():
    with pytest.raises(UserError, match="no chat template"):
        convert({"messages": [user("q"), assistant("a")]}, "auto", chat=False)


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
def test_what_trl_trains_on_is_the_answer_and_the_end_token(tmp_path, template):
    tokenizer = byte_tokenizer()
    rows = to_training_rows(
        Dataset.from_list([{"question": "How many?", "answer": "Four.\n#### 4"}]),
        template=template,
        tokenizer=tokenizer,
    )
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, eos_token_id=2, pad_token_id=0)  # fmt: skip
    args = SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, max_length=None)
    trainer = SFTTrainer(LlamaForCausalLM(config), args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = batch["input_ids"][batch["labels"] != -100]
    assert tokenizer.decode(trained).rstrip("\n") == "Four.\n#### 4<|im_end|>"
    # and of the rows as they are tokenised before there is a model
    made = tokenised(rows, tokenizer, args)
    assert [made[0]["input_ids"], made[0]["labels"]] == [batch["input_ids"][0].tolist(), batch["labels"][0].tolist()]
    length = batch["input_ids"].shape[1]
    assert lengths(made) == [length]
    # beyond what the model was made for, unless they are cut before
    say = lambda cut, context: list(about_lengths(made, "rows", max_length=cut, context=context))
    assert say(None, length) == say(length, None) == []
    for cut in (None, length):
        (told,) = say(cut, length - 1)
        assert told.startswith(f"1 of 1 rows are longer than the {length - 1} tokens that the model was made for")
    assert say(length - 1, length - 1) == [f"1 of 1 rows are longer than max_length {length - 1} and are cut there"]


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c?"}],
        ["a?", "b", "c?"],
        [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}, {"from": "system", "value": "c"}],
    ],
)
def test_what_follows_the_last_answer_is_left_out_and_told(turns):
    told: list[str] = []
    rows = Dataset.from_list([{"conversations": turns}, {"conversations": turns[:2]}])
    made = to_training_rows(rows, tokenizer=byte_tokenizer(), tell=told.append)
    assert [m["content"] for m in made[0]["messages"]] == ["a?", "b"]
    assert told == ["note: 1 of 2 conversations don't end with an answer: what follows it is left out"]


@pytest.mark.parametrize(
    ("row", "told"), [({"prompt": "q", "completion": "a"}, 1), ({"question": "q", "answer": "a"}, 0)]
)
@pytest.mark.parametrize("chat", [True, False])
def test_a_chat_model_that_learns_texts_without_its_template_is_told(row, told, chat):
    lines = []
    to_training_rows(Dataset.from_list([row]), tokenizer=byte_tokenizer(chat=chat), tell=lines.append)
    assert len([line for line in lines if "without the model's chat template" in line]) == told * chat
