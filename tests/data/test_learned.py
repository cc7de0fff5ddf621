"""What is learned is what the row says: over shapes, chat templates and contents, down to where the loss is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_folder import base_tokenizer, byte_tokenizer, save_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from lfu import LfUConfig, LfUTrainer
from lfu.data.columns import as_dataset
from lfu.data.learned import chat_template_utils, tokenised
from lfu.data.templates import to_training_rows
from lfu.support.errors import UserError

# TRL 0.24 ships none; `make ranges` has a newer one farther down the path
SHIPPED = next(path for place in sys.path if (path := Path(place) / "trl" / "chat_templates").is_dir())
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def tokenizer_of(template: str):
    """Bytes as tokens; its template is ChatML's without marks, or one that TRL ships."""
    tokenizer = byte_tokenizer()
    if template != "chatml":
        tokenizer.chat_template = (SHIPPED / f"{template}.jinja").read_text(encoding="utf-8")
        tokenizer.add_special_tokens({"additional_special_tokens": ENDS.get(template, [])})
    return tokenizer


ENDS = {"llama3": ["<|eot_id|>"], "gemma": ["<end_of_turn>", "<start_of_turn>"], "phi3": ["<|end|>"]}
TOKENIZERS = {name: tokenizer_of(name) for name in ("chatml", "qwen3", "qwen2_5", "llama3", "gemma", "phi3")}
ARGS = SFTConfig("out", report_to="none", bf16=False, use_cpu=True, max_length=None)
ARGS.assistant_only_loss = None


def learned_of(rows: list[dict], template: str, args=ARGS) -> list[list[str]]:
    """The texts that are learned of each row: one per run of tokens with a label."""
    tokenizer = TOKENIZERS[template]
    made = tokenised(to_training_rows(as_dataset(rows), tokenizer=tokenizer), tokenizer, args)
    return [runs(tokenizer, row["input_ids"], row["labels"]) for row in made]


def runs(tokenizer, ids: list[int], labels: list[int]) -> list[str]:
    found: list[list[int]] = [[]]
    for token, label in zip(ids, labels):
        assert label in (-100, token)
        if label != -100:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(run) for run in found if run]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def turns_of(texts, *keys_and_names):
    role, content, names = keys_and_names
    return [{role: names[i % 2], content: text} for i, text in enumerate(texts)]


SHAPES = {  # one conversation, question first, in every way that it can be written
    "messages": lambda texts: {"messages": turns_of(texts, "role", "content", ("user", "assistant"))},
    "parts": lambda texts: {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": part} for part in parts]}
            for i, parts in enumerate((text[:1], text[1:]) for text in texts)
        ]
    },
    "sharegpt": lambda texts: {"conversations": turns_of(texts, "from", "value", ("human", "gpt"))},
    "lima": lambda texts: {"conversations": texts},
    "alpaca": lambda texts: {
        "instruction": texts[-2], "output": texts[-1],
        "history": [texts[i : i + 2] for i in range(0, len(texts) - 2, 2)],
    },
}  # fmt: skip
# no template strips these; letters of several bytes, escapes, what looks like JSON or a number, what looks like markup
TEXTS = st.text('ab é\n\\"{}<>4.😀', min_size=0, max_size=8).map(lambda text: f"x{text}y") | st.sampled_from(
    ["4", "4.0", "true", "null", '{"a": null}', "{{ x }}", "</s>", "123456789012345678901234567890"]
)
TALKS = st.integers(1, 3).flatmap(lambda pairs: st.lists(TEXTS, min_size=2 * pairs, max_size=2 * pairs))


@FEW
@given(TALKS, st.sampled_from([*TOKENIZERS]))
@example(["x", "4", "y", "4"], "qwen3")
def test_every_answer_is_learned_in_every_shape_and_no_question_is(texts, template):
    told = {shape: learned_of([make(texts)], template)[0] for shape, make in SHAPES.items()}
    for shape, found in told.items():
        if shape == "alpaca" and len(texts) == 2:  # a question and its answer are prompt and completion
            found = [found[-1]]
        answers = texts[1::2]
        assert len(found) == len(answers), (shape, found)
        for run, answer in zip(found, answers):
            assert answer in run
            rest = run.replace(answer, "", 1)
            assert not any(question in rest for question in texts[::2] if len(question) > 4)
            assert "user" not in rest
    assert told["messages"] == told["sharegpt"] == told["lima"] == told["parts"]


def collated(trainer) -> list[tuple[list[int], list[int]]]:
    """What reaches compute_loss, row by row."""
    seen = []
    compute_loss = type(trainer).compute_loss

    def look(self, model, inputs, *positional, **named):
        for ids, mask, labels in zip(*(inputs[key].tolist() for key in ("input_ids", "attention_mask", "labels"))):
            length = sum(mask)
            seen.append((ids[:length], labels[:length]))
        return compute_loss(self, model, inputs, *positional, **named)

    trainer.compute_loss = look.__get__(trainer)
    trainer.train()
    return seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


ROWS = {
    "prompt": [{"prompt": "Name a bird: ", "completion": " heron"}],
    "chat": [{"prompt": [user("Name a bird.")], "completion": [assistant("  a heron\n")]}],
    "messages": [{"messages": [user("Name a bird."), assistant("heron"), user("a fish"), assistant("trout")]}],
    "text": [{"text": "Herons eat fish."}],
}


@pytest.mark.parametrize("template", ["chatml", "qwen3", "llama3", "gemma"])
@pytest.mark.parametrize("shape", ROWS)
def test_where_trl_takes_the_row_it_is_learned_as_trl_learns_it(tmp_path, folder, shape, template):
    """Down to compute_loss. Of messages TRL learns the answers where it knows the template, else every turn."""
    tokenizer = TOKENIZERS[template]
    answers = shape == "messages" and template != "chatml"
    if answers and chat_template_utils is None:
        pytest.skip("this TRL knows no template")
    options = dict(report_to="none", use_cpu=True, bf16=False, max_steps=1, save_strategy="no", max_length=None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    theirs = SFTTrainer(
        model, SFTConfig(str(tmp_path), assistant_only_loss=answers, **options), processing_class=tokenizer,
        train_dataset=Dataset.from_list(ROWS[shape]),
    )  # fmt: skip
    args = LfUConfig(str(tmp_path), method="sft", **options)
    args.assistant_only_loss = None if answers else False
    rows = to_training_rows(as_dataset(ROWS[shape]), tokenizer=tokenizer)
    ours = LfUTrainer(model, args, processing_class=tokenizer, train_dataset=rows)
    assert collated(ours)[0] == collated(theirs)[0]


GEMMA = (  # begins a conversation with a token, and with what the system says; reasoning stays in the last turn only
    "<|pad|>{% if messages[0].role != 'system' %}<sys>Be good.</sys>{% endif %}{% for m in messages %}"
    "<t>{{ m.role }}\n{{ m.content if loop.last else m.content.split('</think>')[-1] }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<t>assistant\n{% endif %}"
)


@pytest.mark.parametrize("first", ["Quick", "kind", "<|im_start|>"])
def test_an_answer_that_opens_the_conversation_is_learned_alone(first):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = GEMMA
    talk = [assistant(first), user("q"), assistant("a")]
    (row,) = tokenised(to_training_rows(as_dataset([{"messages": talk}]), tokenizer=tokenizer), tokenizer, ARGS)
    assert runs(tokenizer, row["input_ids"], row["labels"]) == [f"{first}<turn>\n", "a<turn>\n"]


@pytest.mark.parametrize("last", ["Mark", "Q", "x"])
def test_the_end_of_an_earlier_answer_is_learned_where_the_token_has_no_role(last):
    """Many base models' tokenizers know the end of a turn, which is neither their end of text nor an extra token."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = GEMMA
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    talk = [user("q"), assistant(f"<think>hm</think>{last}"), user("r"), assistant("a")]
    (row,) = tokenised(to_training_rows(as_dataset([{"messages": talk}]), tokenizer=tokenizer), tokenizer, ARGS)
    assert runs(tokenizer, row["input_ids"], row["labels"]) == [f"{last}<turn>", "a<turn>\n"]


@pytest.mark.parametrize("head", ["messages | length", "(messages | selectattr('role', 'equalto', 'user') | list)[-1]"])
@pytest.mark.parametrize("shape", ["messages", "pair"])
def test_a_question_is_not_learned_where_later_turns_change_how_it_is_written(head, shape):
    """As Mistral's templates do, which write the tools in front of the last question."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = f"{{{{ {head} }}}}\n{tokenizer.chat_template}"
    talk = [user("What?"), assistant("one"), user("Which?"), assistant("two")]
    row = {"messages": talk} if shape == "messages" else {"prompt": talk[:3], "completion": talk[3:]}
    (made,) = tokenised(to_training_rows(as_dataset([row]), tokenizer=tokenizer), tokenizer, ARGS)
    learned = runs(tokenizer, made["input_ids"], made["labels"])
    assert [run.rstrip("\n") for run in learned] == ["one<|im_end|>", "two<|im_end|>"][-len(learned) :]
    assert len(learned) == (2 if shape == "messages" else 1)


def test_a_text_is_ended_once():
    tokenizer, told = base_tokenizer("with an end"), []
    for row in ({"text": "Herons."}, {"prompt": "Name: ", "completion": "Bo"}, {"text": "Herons.<|im_end|>"}):
        rows = to_training_rows(as_dataset([row]), tokenizer=tokenizer)
        (one,) = tokenised(rows, tokenizer, ARGS, told.append)
        ids, labels = one["input_ids"], one["labels"]
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    assert told == ["note: the tokenizer ends texts with <|im_end|>, as training does: it is put there once"] * 3


@pytest.mark.parametrize("row", [{"text": "Herons."}, {"prompt": "Name: ", "completion": "Bo"}])
def test_a_text_is_ended_once_in_a_script(tmp_path, folder, row):
    tokenizer = base_tokenizer("with an end")
    model = AutoModelForCausalLM.from_pretrained(folder)
    args = LfUConfig(str(tmp_path), method="sft", report_to="none", use_cpu=True, bf16=False)
    trainer = LfUTrainer(model, args, processing_class=tokenizer, train_dataset=Dataset.from_list([row]))
    assert trainer.train_dataset[0]["input_ids"].count(tokenizer.eos_token_id) == 1


def test_all_of_a_conversation_as_text_is_learned_where_that_is_asked_for():
    tokenizer = byte_tokenizer(chat=False)
    args = SFTConfig("out", report_to="none", bf16=False, use_cpu=True, completion_only_loss=False)
    rows = to_training_rows(as_dataset([{"conversations": ["q", "a", "r", "b"]}]), tokenizer=tokenizer, template="none")
    (one,) = tokenised(rows, tokenizer, args)
    assert one["labels"] == one["input_ids"]


# -- tools ----------------------------------------------------------------------------------------------------------

ARGUMENTS = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["4", "null", "Bergen", 'a "b"', "é"]) | st.lists(st.integers(0, 9), max_size=2)
    | st.dictionaries(st.sampled_from(["x", "y"]), st.integers(), max_size=2),
    max_size=3,
)  # fmt: skip


@FEW
@given(st.lists(ARGUMENTS, min_size=1, max_size=3), st.booleans())
@example([{"city": "Bergen"}, {"a": 2, "b": None}], False)
def test_arguments_and_tools_are_those_of_the_row(tmp_path_factory, arguments, as_text):
    """Whatever the other rows have, through a file."""
    write = json.dumps if as_text else lambda value: value
    rows = [
        {
            "messages": [user("q"), assistant("", tool_calls=[_call(f"f{i}", write(given_))])],
            "tools": write([{"type": "function", "function": {"name": f"f{i}", "parameters": {"properties": given_}}}]),
        }
        for i, given_ in enumerate(arguments)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from lfu.data.load import load_rows

    tokenizer = TOKENIZERS["qwen3"]
    made = tokenised(to_training_rows(load_rows(str(path)), tokenizer=tokenizer), tokenizer, ARGS)
    for i, (row, given_) in enumerate(zip(made, arguments, strict=True)):
        (run,) = runs(tokenizer, row["input_ids"], row["labels"])
        said = json.loads(run[run.index("<tool_call>") + 11 : run.index("</tool_call>")])
        assert said == {"name": f"f{i}", "arguments": given_}
        shown = tokenizer.decode(row["input_ids"])
        tool = json.loads(shown[shown.index("<tools>\n") + 8 : shown.index("\n</tools>")])
        assert tool["function"]["parameters"] == {"properties": given_}


def _call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("template", ["qwen3", "chatml"])
def test_a_script_may_give_tool_calls_in_a_typed_data_set(tmp_path, folder, template):
    """Arrow gives all calls all arguments, null where a row has none; and a template that drops calls is refused."""
    call = lambda **arguments: [user("q"), assistant("", tool_calls=[_call("f", arguments)])]
    rows = Dataset.from_list([{"messages": call(a=1)}, {"messages": call(b=2)}])
    args = LfUConfig(str(tmp_path), method="sft", report_to="none", use_cpu=True, bf16=False)
    make = lambda: LfUTrainer(
        AutoModelForCausalLM.from_pretrained(folder), args, processing_class=TOKENIZERS[template], train_dataset=rows
    )
    if template == "chatml":
        with pytest.raises(UserError, match=r"data row 1: the chat template leaves out, .*the tool call"):
            make()
        return
    texts = [TOKENIZERS[template].decode(row["input_ids"]) for row in make().train_dataset]
    assert [json.loads(text.split("arguments")[1][3:].split("}")[0] + "}") for text in texts] == [{"a": 1}, {"b": 2}]


def test_a_script_may_give_sharegpt(tmp_path, folder):
    """TRL writes its speakers as they are, `human` and `gpt`, which no template knows."""
    rows = Dataset.from_list([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])
    args = LfUConfig(str(tmp_path), method="sft", report_to="none", use_cpu=True, bf16=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), byte_tokenizer()
    (row,) = LfUTrainer(model, args, processing_class=tokenizer, train_dataset=rows).train_dataset
    wanted = [*turns_of(["q", "a"], "role", "content", ("user", "assistant"))]
    assert row["input_ids"] == row["labels"] == tokenizer.apply_chat_template(wanted)["input_ids"]


def test_a_script_that_learns_every_turn_is_told_of_weights(tmp_path, folder):
    rows = Dataset.from_list([{"messages": [user("q"), assistant("a", weight=0), user("r"), assistant("b", weight=1)]}])
    args = LfUConfig(str(tmp_path), method="sft", report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(UserError, match=r"weight 0, .*drop one"):
        LfUTrainer(
            AutoModelForCausalLM.from_pretrained(folder), args, processing_class=byte_tokenizer(), train_dataset=rows
        )


# -- what a template leaves out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma"])
def test_a_tool_call_that_the_template_drops_is_refused(template):
    row = {"messages": [user("q"), assistant("", tool_calls=[_call("get_weather", {"city": "Bergen"})])]}
    with pytest.raises(UserError, match=r"data row 2: the chat template leaves out, or .* tool call .*Bergen"):
        learned_of([{"messages": [user("q"), assistant("a")]}, row], template)


def test_arguments_that_the_template_encodes_twice_are_refused():
    tokenizer = byte_tokenizer()
    calls = "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{calls}{{{{ m.content }}}}{{% endfor %}}"
    row = {"messages": [user("q"), assistant("", tool_calls=[_call("f", 'not "JSON"')])]}
    rows = to_training_rows(as_dataset([row]), tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"data row 1: .*the tool call"):
        tokenised(rows, tokenizer, ARGS)


@pytest.mark.parametrize("turn", [assistant(""), assistant(None), assistant(" \n"), user("")])
def test_an_empty_turn_is_refused_wherever_it_is(turn):
    other = user("r") if turn["role"] == "assistant" else assistant("b")
    talk = [user("q"), assistant("a"), user("r"), assistant("b")]
    talk[1 if turn["role"] == "assistant" else 2] = turn
    for row in ({"messages": talk}, {"conversations": [{"from": t["role"], "value": t["content"]} for t in talk]}):
        with pytest.raises(UserError, match=r"row 1: .*(is empty|none of them blank)"):
            learned_of([row], "chatml")
    assert other


def test_what_is_left_out_is_told():
    tokenizer, told = TOKENIZERS["chatml"], []
    tool = {"type": "function", "function": {"name": "find_it", "parameters": {}}}
    rows = as_dataset([{"messages": [user("q"), assistant("a", mood="dry")], "tools": [tool], "meta": {"x": 10**40}}])
    tokenised(to_training_rows(rows, tokenizer=tokenizer, tell=told.append), tokenizer, ARGS, told.append)
    assert sorted(told) == [
        "note: column 'meta' of the data is left out",
        "warning: the chat template does not use the key 'mood' of messages in 1 row (first: row 1)",
        "warning: the chat template leaves out the tools in 1 row (first: row 1)",
    ]


def test_a_special_token_in_a_text_and_a_question_in_a_completion_are_told():
    told: list[str] = []
    rows = [
        {"prompt": [user("q")], "completion": [assistant("a"), user("r"), assistant("b")]},
        {"prompt": [user("q")], "completion": [assistant("a<|im_end|>b")]},
    ]
    tokenised(
        to_training_rows(as_dataset(rows), tokenizer=TOKENIZERS["chatml"]), TOKENIZERS["chatml"], ARGS, told.append
    )
    assert told == [
        "warning: the completion also teaches what the user says in 1 row (first: row 1)",
        "warning: the tokenizer reads <|im_end|> in a text as that special token in 1 row (first: row 2)",
    ]


@pytest.mark.parametrize("none", ["", None, {}, "{}"])
def test_a_call_of_a_function_that_takes_nothing(none):
    row = {"messages": [user("q"), assistant("", tool_calls=[_call("now", none)])]}
    (run,) = learned_of([row], "qwen3")[0]
    assert '{"name": "now", "arguments": {}}' in run


def test_an_argument_that_ends_with_a_line_break_and_a_call_without_a_name():
    row = {"messages": [user("q"), assistant("", tool_calls=[_call("write", {"text": "é\n"})])]}
    assert r'"text": "é\n"' in learned_of([row], "qwen3")[0][0]
    row = {"messages": [user("q"), assistant("", tool_calls=[_call(None, {"text": "a"})])]}
    with pytest.raises(UserError, match=r"data row 1: .*turn 2: a tool call has no name"):
        learned_of([row], "qwen3")


CALLED = {"role": "assistant", "tool_calls": [{"name": "find_it", "arguments": {"city": "Bergen"}}]}
TOOL = {"role": "tool", "content": "rain in Bergen"}
LOSES = "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{}<|im_end|>\n{{% endfor %}}"
THINKS = {"role": "assistant", "content": "<think>hm, hm</think>two"}
TOLD = {  # what a template writes of a message; a row; what is told
    "an option": ("{{ m.content }}", {"chat_template_kwargs": {"thinkng": False}}, "has no option 'thinkng'"),
    "tools whose names are said": (
        "{{ m.content }}", {"messages": [user("find_it"), assistant("a")], "tools": [{"name": "find_it"}]}, "the tools"
    ),
    "reasoning": ("{{ m.content.split('</think>')[-1] }}", {"messages": [user("q"), THINKS]}, "reasoning of answers"),
    "reasoning of its own": (
        "{{ m.content }}", {"messages": [user("q"), assistant("a", reasoning_content="hm")]}, "reasoning of answers"
    ),
    "an earlier call": (
        "{{ m.content }}", {"prompt": [user("q"), CALLED, TOOL], "completion": [assistant("a")]},
        "leaves out a tool call of the assistant",
    ),
    "a call that is not learned": (
        "{{ m.content }}", {"messages": [user("q"), CALLED | {"weight": 0}, TOOL, assistant("a")]},
        "leaves out a tool call of the assistant",
    ),
    "an earlier answer": (
        "{{ m.content if m.role != 'assistant' or loop.last }}",
        {"prompt": [user("q"), assistant("first"), user("r")], "completion": [assistant("a")]},
        "leaves out what the assistant says",
    ),
    "what is said elsewhere, too": (
        "{{ m.content if m.role != 'system' }}",
        {"messages": [{"role": "system", "content": "Be nice"}, user("Be nice!"), assistant("a")]},
        "leaves out what the system says",
    ),
    "line breaks": (
        "{{ m.content.replace('\\n', ' ') }}", {"messages": [user("q"), assistant("a\nb")]},
        "changes letters or white space of answers",
    ),
    "a key like a word of the template": (
        "{{ m.content }}{# trained #}", {"messages": [user("q", ), assistant("a", trained=1)]}, "the key 'trained'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_whatever_a_template_loses_is_told(case):
    content, row, line = TOLD[case]
    tokenizer, told = byte_tokenizer(), list[str]()
    tokenizer.chat_template = LOSES.format(content)
    rows = as_dataset([{"messages": [user("q"), assistant("a")]} | row if "prompt" not in row else row])
    tokenised(to_training_rows(rows, tokenizer=tokenizer, tell=told.append), tokenizer, ARGS, told.append)
    assert len(told) == 1, told
    assert line in told[0]
    tokenizer.chat_template = LOSES.format(
        "{{ m.reasoning_content }}{{ m.content }}{{ m.trained }}{% for c in m.tool_calls %}{{ c.function | tojson }}"
        "{% endfor %}{{ thinkng }}{{ tools if loop.first }}"
    )
    tokenised(to_training_rows(rows, tokenizer=tokenizer, tell=told.append), tokenizer, ARGS, told.append)
    assert len(told) == 1, told


def test_a_template_without_an_end_is_told():
    tokenizer, told = byte_tokenizer(), list[str]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rows = to_training_rows(as_dataset([{"question": "q", "answer": "a"}]), tokenizer=tokenizer)
    tokenised(rows, tokenizer, ARGS, told.append)
    assert [line for line in told if "no special token behind an answer" in line]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "q", "answer": "a <|im_end|> b"}, "reads <|im_end|> in a text"),
        ({"question": "<|im_start|>q", "answer": "a"}, "reads <|im_start|> in a text"),
        ({"conversations": ["q", "a", "r", "b"]}, ""),
        ({"text": "said<|im_end|>\n"}, "the text ends with <|im_end|> and white space"),
        ({"text": "said<|im_end|>"}, ""),
        ({"text": "<|im_start|>user\nq<|im_end|>\na"}, ""),
    ],
)
def test_special_tokens_in_texts_are_told(row, line):
    tokenizer, told = byte_tokenizer(chat=False), list[str]()
    tokenised(to_training_rows(as_dataset([row]), tokenizer=tokenizer, tell=told.append), tokenizer, ARGS, told.append)
    assert len(told) == bool(line), told
    assert line in "".join(told)


@pytest.mark.parametrize(
    ("prompt", "answer", "line"),
    [("q ", "a", "a token goes over"), ("q", "a", "warning: a token goes over"), ("q\n", "a", ""), ("q", " a", "")],
)
def test_a_token_over_the_border_of_prompt_and_answer_is_told(prompt, answer, line):
    tokenizer, told = byte_tokenizer(chat=False), []
    tokenizer.add_tokens(["qa", " a"])
    rows = to_training_rows(as_dataset([{"prompt": prompt, "completion": answer}]), tokenizer=tokenizer)
    tokenised(rows, tokenizer, ARGS, told.append)
    assert len(told) == bool(line), told
    assert line in "".join(told)


def test_a_tokenizer_without_an_end_is_named():
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.eos_token = None
    rows = to_training_rows(as_dataset([{"question": "q", "answer": "a"}]), tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"no end-of-sequence token .*--eos_token"):
        tokenised(rows, tokenizer, ARGS)


def test_white_space_around_an_answer_is_kept_or_told():
    code, told = "    return x\n", []
    assert learned_of([{"question": "q", "answer": code}], "chatml") == [[f"{code}<|im_end|>\n"]]
    rows = to_training_rows(as_dataset([{"question": "q", "answer": code}]), tokenizer=TOKENIZERS["llama3"])
    tokenised(rows, TOKENIZERS["llama3"], ARGS, told.append)
    assert told == ["warning: the chat template takes the white space around answers off in 1 row (first: row 1)"]


def test_white_space_that_a_decoder_drops_is_not_lost():
    """SentencePiece's takes the first space off a text, and so off a part of one."""
    tokenizer, told = base_tokenizer("Llama 2"), []
    tokenizer.chat_template = TOKENIZERS["chatml"].chat_template
    rows = to_training_rows(as_dataset([{"question": "q", "answer": " return"}]), tokenizer=tokenizer)
    tokenised(rows, tokenizer, ARGS, told.append)
    assert told == []


def test_a_conversation_as_text_has_all_its_answers_learned():
    tokenizer = byte_tokenizer(chat=False)
    row = {"conversations": ["q", "a one", "r", "b two"], "system": "S"}
    for template in ("alpaca", "none"):
        made = to_training_rows(as_dataset([row]), tokenizer=tokenizer, template=template)
        (one,) = tokenised(made, tokenizer, ARGS)
        assert runs(tokenizer, one["input_ids"], one["labels"]) == ["a one<|im_end|>", "b two<|im_end|>"]


def test_the_check_reads_what_a_tokenizer_changes():
    """A tokenizer that knows no accents and no capitals is no reason to refuse a row."""
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    rows = to_training_rows(as_dataset([{"question": "Ä", "answer": "Über Alles"}]), tokenizer=tokenizer)
    told: list[str] = []
    (one,) = tokenised(rows, tokenizer, ARGS, told.append)
    assert "uber alles" in tokenizer.decode(one["input_ids"])
    tokenizer.chat_template = None
    tokenised(to_training_rows(as_dataset([{"text": "Ä"}]), tokenizer=tokenizer), tokenizer, ARGS, told.append)
    assert [line[:60] for line in told] == [
        "warning: the chat template or the tokenizer changes letters ",
        "warning: the tokenizer changes letters or white space of tex",
    ]


# -- answers that are not to be learned -------------------------------------------------------------------------------


@FEW
@given(TALKS, st.data(), st.sampled_from([*TOKENIZERS]), st.sampled_from(["messages", "sharegpt"]))
def test_an_answer_with_weight_0_is_not_learned(texts, data, template, shape):
    row = SHAPES[shape](texts)
    talk = next(iter(row.values()))
    weights = data.draw(st.lists(st.sampled_from([0, 1, None]), min_size=len(texts) // 2, max_size=len(texts) // 2))
    for turn, weight in zip(talk[1::2], weights):
        turn["weight"] = weight
    wanted = [answer for answer, weight in zip(texts[1::2], weights) if weight != 0]
    if not wanted:
        with pytest.raises(UserError, match=r"row 1: .* every answer has weight 0"):
            learned_of([row], template)
        return
    found = learned_of([row], template)[0]
    assert len(found) == len(wanted)
    assert all(answer in run for answer, run in zip(wanted, found))


def test_an_answer_with_weight_0_leaves_other_rows_as_they_are():
    """Qwen3's own template drops the reasoning of earlier turns, and the one that it is trained with does not."""
    talk = [user("q"), assistant("<think>hm</think>a"), user("r"), assistant("b")]
    skipped = {"messages": [user("q"), assistant("a", weight=0), user("r"), assistant("b")]}
    alone, beside = learned_of([{"messages": talk}], "qwen3"), learned_of([{"messages": talk}, skipped], "qwen3")
    assert [run.strip() for run in alone[0]] == [run.strip() for run in beside[0]]
    assert ("hm" in beside[0][0]) == (chat_template_utils is not None)  # TRL 0.24 trains with Qwen3's own


@pytest.mark.parametrize("key", ["train", "training"])
def test_axolotls_way_to_say_that_a_turn_is_not_learned(key):
    talk = [user("q"), assistant("a", **{key: False}), user("r"), assistant("b", **{key: True})]
    assert learned_of([{"messages": talk}], "chatml") == [["b<|im_end|>\n"]]
    with pytest.raises(UserError, match=rf"row 1: .*turn 2: {key} is 'no'"):
        learned_of([{"messages": [user("q"), assistant("a", **{key: "no"})]}], "chatml")


def test_a_weight_that_cannot_be_followed_is_refused():
    talk = [user("q"), assistant("a", weight=0), user("r"), assistant("b")]
    every = SFTConfig("out", report_to="none", bf16=False, use_cpu=True, assistant_only_loss=False)
    with pytest.raises(UserError, match=r"weight 0.*--assistant_only_loss false"):
        learned_of([{"messages": talk}], "chatml", every)
    with pytest.raises(UserError, match=r"row 1: .*'completion' has an answer with weight 0"):
        learned_of([{"prompt": talk[:1], "completion": talk[1:]}], "chatml")
    with pytest.raises(UserError, match=r"row 1: .*turn 2: weight is 0\.5"):
        learned_of([{"messages": [user("q"), assistant("a", weight=0.5)]}], "chatml")
    pairs = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}] * 2
    with pytest.raises(UserError, match=r"row 1: .*every answer has weight 0"):
        learned_of([{"conversations": pairs}], "chatml")
    pairs[-1] = pairs[-1] | {"weight": 1}
    with pytest.raises(UserError, match="row 1: an answer with weight 0 needs a chat template"):
        to_training_rows(as_dataset([{"conversations": pairs}]), tokenizer=byte_tokenizer(chat=False))
