"""Instruction Modelling: which tokens carry the loss, against rows labelled by hand, and the loss itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bench import Float64Throughout, config, small_model, step_of, tiny_trainer, written_out
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DEVICE, relative_difference
from tiny_folder import CHAT_TEMPLATE, byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from lfu.data.templates import alpaca_prompt
from lfu.methods.im import InstructionModelling, content_of_prompt
from lfu.methods.run import Preparation
from lfu.support.errors import UserError

BYTES = byte_tokenizer()
PLAIN = byte_tokenizer(chat=False)
# Templates that strip, begin with a special token, bring a system prompt of their own, or put the user's elsewhere.
LLAMA3 = (
    "{{ '<|im_start|>' }}{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {% if loop.index0 >= rest | length - 2 %}{{ first }}{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# Reasoning is taken out of the content of all but the last message, and set anew in the last.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% set t = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}"
    "{% if t | length > 1 %}{{ t[0].split('<think>')[-1].strip() }}"
    "{% elif m.reasoning_content %}{{ m.reasoning_content }}{% endif %}{{ '\n</think>\n\n' }}{% endif %}"
    "{{ t[-1].lstrip('\n') }}<|im_end|>{{ '\n' }}{% endfor %}"
)
# Shows what the assistant said last, and nothing of what it said before.
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}<|im_end|>"
    "{% endfor %}"
)
# A word for the end of a turn, which may or may not be a special token.
WORDS = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<stop>\n{% endfor %}"

WORD = st.text("abs\nu<|>:{} #é漢", min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    ["user", "assistant", "s", "im_start", "<think>", "a", "system\n", "### Response:\n"]
)


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def run_of(tokenizer=BYTES, said=None, **args):
    settings = {"dataset_text_field": "text", "completion_only_loss": None, "eos_token": None} | args
    return Preparation(None, tokenizer, SimpleNamespace(**settings), (said if said is not None else []).append)


def labelled(row, tokenizer=BYTES, **args):
    return InstructionModelling().rows(Dataset.from_list([row]), run_of(tokenizer, **args))[0]


def by_hand(pieces, tokenizer):
    """(text, whether it carries the loss) one after the other, as ids and labels; one token a byte."""
    ids, labels = [], []
    for text, on in pieces:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        labels += found if on else [-100] * len(found)
    return {"input_ids": ids, "labels": labels}


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# --- which tokens ----------------------------------------------------------------------------------------------------


@given(WORD, WORD, WORD, WORD)
@settings(max_examples=40, deadline=None)
def test_chatml(first, second, third, fourth):
    """Whatever the contents say, role markers and pieces of the template among them."""
    begin = lambda role: (f"<|im_start|>{role}\n", False)
    expected = by_hand(
        [
            *(begin("user"), (first, True), ("<|im_end|>\n", False)),
            *(begin("assistant"), (second, True), ("<|im_end|>", True), ("\n", False)),
            *(begin("user"), (third, True), ("<|im_end|>\n", False)),
            *(begin("assistant"), (fourth, True), ("<|im_end|>", True), ("\n", False)),
        ],
        BYTES,
    )
    turns = [user(first), bot(second), user(third), bot(fourth)]
    assert labelled({"prompt": turns[:3], "completion": turns[3:]}) == expected
    assert labelled({"messages": turns}) == expected


@pytest.mark.parametrize("turn", [1, 3])
def test_an_answer_with_weight_0_is_not_learned(turn):
    turns = [user("q"), bot("one"), user("r"), bot("two")]
    without = labelled({"messages": turns})
    turns[turn]["weight"] = 0
    found = labelled({"messages": turns})
    assert found["input_ids"] == without["input_ids"]
    lost = [old for old, new in zip(without["labels"], found["labels"]) if old != new]
    assert BYTES.decode(lost) == f"{turns[turn]['content']}<|im_end|>"


@given(WORD, WORD)
@settings(max_examples=30, deadline=None)
def test_contents_that_the_template_strips(question, answer):
    expected = by_hand(
        [
            *(("<|im_start|><h>user</h>\n\n", False), (question.strip(), True)),
            *(("<|im_end|><h>assistant</h>\n\n", False), (answer.strip(), True), ("<|im_end|>", True)),
        ],
        BYTES,
    )
    row = {"prompt": [user(question)], "completion": [bot(answer)]}
    assert labelled(row, with_template(LLAMA3)) == expected


def test_a_system_message_counts_and_the_templates_own_does_not():
    tokenizer = with_template(QWEN)
    tail = [("<|im_end|>\n<|im_start|>user\n", False), ("q", True), ("<|im_end|>\n<|im_start|>assistant\n", False)]
    tail += [("a", True), ("<|im_end|>", True), ("\n", False)]
    row = {"prompt": [user("q")], "completion": [bot("a")]}
    own = by_hand([("<|im_start|>system\nYou are helpful", False), *tail], BYTES)
    assert labelled(row, tokenizer) == own
    row["prompt"] = [system("You are helpful"), *row["prompt"]]
    given_ = by_hand([("<|im_start|>system\n", False), ("You are helpful", True), *tail], BYTES)
    assert labelled(row, tokenizer) == given_


def test_a_system_message_that_the_template_puts_elsewhere():
    row = {"messages": [system("s"), user("one"), bot("two"), user("three"), bot("four")]}
    expected = by_hand(
        [
            *(("[INST] ", False), ("one", True), ("[/INST] ", False), ("two", True), ("<|im_end|>", True)),
            *(("[INST] ", False), ("s", True), ("\n\n", False), ("three", True), ("[/INST] ", False)),
            *(("four", True), ("<|im_end|>", True)),
        ],
        BYTES,
    )
    assert labelled(row, with_template(MISTRAL)) == expected


def test_reasoning():
    tokenizer = with_template(THINKING)
    head = [("<|im_start|>user\n", False), ("q", True), ("<|im_end|>\n<|im_start|>assistant\n", False)]
    tail = [("<|im_end|>", True), ("\n", False)]
    inside = {"messages": [user("q"), bot("<think>\nwell\n</think>\n\na")]}
    assert labelled(inside, tokenizer) == by_hand([*head, ("<think>\nwell\n</think>\n\na", True), *tail], BYTES)
    beside = {"messages": [user("q"), bot("a") | {"reasoning_content": "well"}]}
    pieces = [("<think>\n", False), ("well", True), ("\n</think>\n\n", False), ("a", True)]
    assert labelled(beside, tokenizer) == by_hand([*head, *pieces, *tail], BYTES)


def test_the_end_of_turn_of_a_base_models_tokenizer():
    """The template ends turns with a special token that is not the tokenizer's end of sequence."""
    tokenizer = with_template(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    row = {"messages": [user("q"), bot("a"), user("r"), bot("b")]}
    pieces = [
        *(("<|im_start|>user: ", False), ("q", True)),
        *(("<stop>\n<|im_start|>assistant: ", False), ("a", True), ("<stop>", True)),
        *(("\n<|im_start|>user: ", False), ("r", True)),
        *(("<stop>\n<|im_start|>assistant: ", False), ("b", True), ("<stop>", True), ("\n", False)),
    ]
    assert labelled(row, tokenizer) == by_hand(pieces, tokenizer)


@pytest.mark.parametrize(
    ("end", "first", "last"),
    [
        ("<stop>", [("<stop>", False)], [("<stop>", False)]),  # six bytes here, and no token
        ("{{ '<|im_end|>' if loop.last else ' / ' }}", [(" / ", False)], [("<|im_end|>", True)]),
        ("{{ '<|pad|>' if loop.last else '<|im_end|>' }}", [("<|im_end|>", True)], [("<|pad|>", True)]),
    ],
    ids=["no end", "an end after the last answer alone", "another end after the last answer"],
)
def test_ends_of_turns(end, first, last):
    (between, _), line = first[0], ("\n", False)
    pieces = [
        *(("<|im_start|>user: ", False), ("q", True), (f"{between}\n<|im_start|>assistant: ", False)),
        *(("a", True), *first, line, ("<|im_start|>user: ", False), ("r", True)),
        *((f"{between}\n<|im_start|>assistant: ", False), ("b", True), *last, line),
    ]
    row = {"messages": [user("q"), bot("a"), user("r"), bot("b")]}
    assert labelled(row, with_template(WORDS.replace("<stop>", end))) == by_hand(pieces, BYTES)


@pytest.mark.parametrize("question", ["say it loud", "loud", "!"])
def test_a_template_that_writes_something_elsewhere_because_of_a_content(question):
    """The content is searched for then, behind the message before."""
    template = CHAT_TEMPLATE + "{{ 'Not so, please!' if 'loud' in messages[-1].content }}"
    row = {"messages": [user(question), bot("loud")]}
    pieces = [("<|im_start|>user\n", False), (question, True), ("<|im_end|>\n<|im_start|>assistant\n", False)]
    pieces += [("loud", True), ("<|im_end|>", True), ("\nNot so, please!", False)]
    assert labelled(row, with_template(template)) == by_hand(pieces, BYTES)


def test_a_conversation_that_the_user_ends():
    row = {"messages": [user("q"), bot("a"), user("r")]}
    pieces = [("<|im_start|>user\n", False), ("q", True), ("<|im_end|>\n<|im_start|>assistant\n", False), ("a", True)]
    pieces += [("<|im_end|>", True), ("\n<|im_start|>user\n", False), ("r", True), ("<|im_end|>\n", False)]
    assert labelled(row) == by_hand(pieces, BYTES)


@pytest.mark.parametrize("column", ["text", "body"])
def test_texts_without_a_frame_carry_the_loss_throughout(column):
    assert labelled({column: "A text."}, PLAIN, dataset_text_field=column) == by_hand(
        [("A text.<|im_end|>", True)], PLAIN
    )
    ended = {"prompt": "Q\n", "completion": "A<|im_end|>"}  # no second end
    assert labelled(ended, PLAIN) == by_hand([("Q\nA<|im_end|>", True)], PLAIN)


@given(WORD.filter(lambda text: "###" not in text), st.just("") | st.just("some input"), st.booleans())
@settings(max_examples=30, deadline=None)
def test_alpaca(question, extra, whole):
    question = question.strip()
    prompt = alpaca_prompt(question, extra)
    preamble = prompt.partition("\n")[0]
    pieces = [(f"{preamble}\n\n### Instruction:\n", False), (question, True)]
    pieces += [("\n\n### Input:\n", False), (extra, True)] if extra else []
    pieces += [("\n\n### Response:\n", False), ("yes", True), ("<|im_end|>", True)]
    row = {"text": f"{prompt}yes"} if whole else {"prompt": prompt, "completion": "yes"}
    assert labelled(row, PLAIN) == by_hand(pieces, PLAIN)


def test_an_instruction_in_place_of_alpacas_first_paragraph_counts():
    prompt = alpaca_prompt("q", system="Be brief.")
    spans = [prompt[start:end] for start, end in content_of_prompt(prompt)]
    assert spans == ["Be brief.", "q"]


def test_tokens_across_the_border_count_as_content():
    """BPE without a split at white space merges the template's line break with the content's first letters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    prompt, alphabet = alpaca_prompt("What now"), pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["\nWhat", "now\n"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    row = labelled({"prompt": prompt, "completion": "ok"}, tokenizer)
    start, end = prompt.index("What now"), prompt.index("What now") + len("What now")
    seen, straddling = 0, 0
    for token, label in zip(row["input_ids"], row["labels"]):
        text = tokenizer.decode([token])
        characters = range(seen, seen + len(text))
        inside = sum(start <= c < end or c >= len(prompt) for c in characters)
        assert label == (token if inside else -100)
        straddling += 0 < inside < len(text)
        seen += len(text)
    assert straddling >= 1


# --- the same input_ids as TRL's -------------------------------------------------------------------------------------

ROWS = {
    "chat": [
        {"prompt": [user("q w"), bot("a"), user("r")], "completion": [bot("b é")]},
        {"prompt": [system("s"), user(" q")], "completion": [bot("b")]},
    ],
    "messages": [{"messages": [user(" q "), bot("a\n")]}, {"messages": [user("q"), bot("a"), user("r"), bot("b")]}],
    "tools": [{"messages": [user("q"), bot("a")], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"x": 1}}],
    "texts": [{"prompt": alpaca_prompt("q"), "completion": "a"}, {"prompt": "Q: ", "completion": "x<|im_end|>"}],
    "text": [{"text": "Some text"}, {"text": alpaca_prompt("q") + "a"}],
}  # fmt: skip


def labels_of(row, completion_only=True):
    """Those of a row as TRL prepares it: 0.24 has a mask in their place, which its collator goes by if it shall."""
    mask = (completion_only and row.get("completion_mask")) or [1] * len(row["input_ids"])
    return row.get("labels") or [token if one else -100 for token, one in zip(row["input_ids"], mask)]


def small():
    return small_model(vocab_size=300, max_position_embeddings=512)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("bos", [False, True])
def test_input_ids_are_those_of_trl(tmp_path, rows, bos, monkeypatch):
    if bos:  # a tokenizer that puts a token in front of texts
        monkeypatch.setattr("bench.byte_tokenizer", _with_bos)
    options = dict(rows=rows, max_length=512)
    plain = tiny_trainer("sft", tmp_path, model=small(), **options).train_dataset
    ours = tiny_trainer("im", tmp_path, model=small(), **options).train_dataset
    assert ours["input_ids"] == plain["input_ids"]
    assert set(ours.column_names) == {"input_ids", "labels"}
    for mine, theirs in zip(ours, plain):
        assert [a for a, b in zip(mine["labels"], mine["input_ids"]) if a not in (-100, b)] == []
        if "prompt" in rows[0]:  # what SFT trains of the answer, up to its end, IM trains too
            trained = [token for token in labels_of(theirs) if token != -100]
            assert trained[: trained.index(2) + 1] == mine["labels"][-len(trained) :][: trained.index(2) + 1]


def test_the_end_of_sequence_that_the_config_names(tmp_path):
    options = dict(rows=ROWS["texts"] + ROWS["texts"], max_length=512, eos_token="<|im_start|>")
    plain = tiny_trainer("sft", tmp_path, model=small(), **options).train_dataset
    ours = tiny_trainer("im", tmp_path, model=small(), **options).train_dataset
    assert ours["input_ids"] == plain["input_ids"]
    assert ours[0]["labels"][-1] == 1


def _with_bos(**options):
    from tokenizers import processors

    tokenizer = byte_tokenizer(**options)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return tokenizer


def test_cutting_stays_trls(tmp_path):
    rows = [{"prompt": [user("a long question")], "completion": [bot("answer")]}]
    whole = labelled(rows[0])
    cut = tiny_trainer("im", tmp_path, model=small(), rows=rows, max_length=20).train_dataset
    assert cut.to_list() == [{name: values[:20] for name, values in whole.items()}]


def test_packing(tmp_path):
    rows = ROWS["chat"] * 3
    packed = tiny_trainer("im", tmp_path, model=small(), rows=rows, packing=True, max_length=128).train_dataset
    loose = [labelled(row) for row in rows]
    assert sorted(token for row in packed for token in row["labels"]) == sorted(
        token for row in loose for token in row["labels"]
    )


@pytest.mark.parametrize(("rows", "answer_only"), [(ROWS["chat"], True), (ROWS["messages"], False)])
def test_evaluation_rows_are_scored_as_without_the_method(tmp_path, rows, answer_only):
    options = dict(rows=rows, eval_rows=rows, max_length=512)
    ours = tiny_trainer("im", tmp_path, model=small(), **options).eval_dataset
    plain = tiny_trainer("sft", tmp_path, model=small(), **options).eval_dataset
    assert ours.to_list() == plain.to_list()
    assert any(-100 in labels_of(row) for row in ours) == answer_only


# --- the loss --------------------------------------------------------------------------------------------------------


def test_value_and_gradient(tmp_path):
    """Against the cross entropy over tokens labelled by hand."""
    rows = [
        {"prompt": [user("what?")], "completion": [bot("this")]},
        {"prompt": [system("be brief"), user("why")], "completion": [bot("so")]},
    ]
    begin, end = lambda role: (f"<|im_start|>{role}\n", False), ("<|im_end|>\n", False)
    stop = [("<|im_end|>", True), ("\n", False)]
    hand = [
        by_hand([begin("user"), ("what?", True), end, begin("assistant"), ("this", True), *stop], BYTES),
        by_hand([begin("system"), ("be brief", True), end, begin("user"), ("why", True), end, begin("assistant"),
                 ("so", True), *stop], BYTES),
    ]  # fmt: skip
    trainer = tiny_trainer("im", tmp_path, model=small(), rows=rows, max_length=512)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    value, found = step_of(trainer, batch)

    total, tokens = 0.0, 0
    for row in hand:
        ids, labels = torch.tensor([row["input_ids"]], device=DEVICE), torch.tensor(row["labels"], device=DEVICE)
        with Float64Throughout():
            logits = trainer.model(input_ids=ids, use_cache=False).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], reduction="sum")
        tokens += int((labels[1:] != -100).sum())
    loss = total / tokens
    assert value == pytest.approx(float(loss.detach()), rel=1e-10)
    assert relative_difference(found, written_out(trainer.model, loss)) < 1e-9


def test_it_differs_from_completion_only_loss_false_by_the_template(tmp_path):
    options = dict(rows=ROWS["chat"], max_length=512, model=small())
    ours = tiny_trainer("im", tmp_path, **options).train_dataset
    trls = tiny_trainer("sft", tmp_path, completion_only_loss=False, **options).train_dataset
    for mine, theirs in zip(ours, trls):
        left_out = [b for a, b in zip(mine["labels"], labels_of(theirs, False)) if a != b]
        assert set(BYTES.decode(left_out)) <= set("<|im_start|>user\n<|im_end|>\nassistant\nsystem")
        assert left_out
    assert -100 not in labels_of(trls[0], False)


# --- told and refused ------------------------------------------------------------------------------------------------


def test_what_is_told():
    said = []
    InstructionModelling().rows(
        Dataset.from_list([{"text": "ab"}, {"text": alpaca_prompt("q") + "a"}]), run_of(PLAIN, said)
    )
    total = 3 + len(alpaca_prompt("q")) + 2
    assert said == [f"im: the loss is on {3 + 3} of {total} tokens, those of instruction and answer"]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
PARTS = [{"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([user("q"), CALL], r"row 1: message 2 \(assistant\) calls a tool"),
        ([user(PARTS), bot(PARTS)], r"row 1: message 1 \(user\) has a content that is not a text"),
        ([user("q"), bot("a"), user("r"), bot("c")], r"row 1: message 2 \(assistant\) can't be found"),
    ],
)
def test_rows_that_can_not_be_labelled(turns, words):
    with pytest.raises(UserError, match=words):
        labelled({"messages": turns}, with_template(FORGETFUL))


def test_the_row_is_named():
    rows = [{"messages": [user("q"), bot("a")]}, {"messages": [user("q"), bot("a"), user("r"), bot("c")]}]
    with pytest.raises(UserError, match="data row 2"):
        InstructionModelling().rows(Dataset.from_list(rows), run_of(with_template(FORGETFUL)))


def test_settings_that_contradict(tmp_path):
    with pytest.raises(ValueError, match="assistant_only_loss=True takes it off"):
        config(tmp_path, "im", assistant_only_loss=True)
    with pytest.raises(ValueError, match="chat_template_path"):
        config(tmp_path, "im", chat_template_path="somewhere")


def test_slow_tokenizers_are_refused():
    slow = SimpleNamespace(is_fast=False, eos_token="")
    with pytest.raises(ValueError, match="use a fast tokenizer"):
        labelled({"text": "a"}, slow)


@pytest.mark.parametrize("row", [{"input_ids": [1]}, {"story": "x"}])
def test_shapes_that_are_refused(row):
    with pytest.raises(UserError, match="method 'im'"):
        labelled(row)
