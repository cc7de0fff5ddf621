"""From the shapes that data sets come in to what TRL trains on: prompt and completion, or a conversation.

    instruction (+ input, history), output    Alpaca, Dolly (also `context`, `response`)
    question, answer                          GSM8K; with `choices` as well ARC, MMLU and other multiple choice
    conversations                             LIMA (texts in turn), ShareGPT (`from`, `value`)
    messages; prompt, completion; text        TRL's own

A question becomes the prompt and its answer the completion; a conversation becomes `messages`. `system`, `tools` and
`chat_template_kwargs` go with it. Every other column is dropped, and named.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lfu.data.turns import (
    Blank,
    Message,
    a,
    check_turns,
    is_learned,
    kwargs_of,
    messages_of,
    parsed,
    text_of,
    tools_of,
)
from lfu.support.errors import UserError, did_you_mean, one_line

if TYPE_CHECKING:  # half a second of importing that `lfu train --help` need not wait for
    from datasets import Dataset

    from lfu.support.annotations import Tokenizer

TEMPLATES = ("auto", "chat", "alpaca", "none")
ACCEPTED = (
    "messages; prompt and completion; instruction (and input) and output; question and answer (and choices); "
    "conversations; text"
)
INPUTS, OUTPUTS, SYSTEMS = ("input", "context"), ("output", "response"), ("system", "system_prompt")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_KNOWN = {"messages", "prompt", "completion", "instruction", *INPUTS, *OUTPUTS, "question", "answer", "answerKey"} | {
    "choices", "conversations", "text", "tools", "chat_template_kwargs", "history", *SYSTEMS
}  # fmt: skip
_NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")
# What changes a row's meaning, so that leaving it out is a warning and no note.
_MEANT = {*SYSTEMS, *INPUTS, "tools", "history", "chat_template_kwargs"}

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

Row = dict[str, Any]


def to_training_rows(
    dataset: Dataset,
    *,
    template: str = "auto",
    tokenizer: Tokenizer,
    system: str | None = None,
    text_field: str = "text",
    tell: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Turns a data set of any accepted shape into what `SFTTrainer` takes.

    Args:
        dataset: the rows, as `load_rows` gives them.
        template: how a question becomes a prompt: `chat` (the tokenizer's chat template), `alpaca` (for base models),
            `none` (the bare question and a line break), or `auto`: chat if the tokenizer has a chat template, else
            alpaca.
        tokenizer: looked at for its chat template and its beginning-of-sequence token.
        system: system message (chat), or the text that replaces Alpaca's first paragraph, where a row has none of its
            own.
        text_field: the column of plain texts (`SFTConfig.dataset_text_field`).
        tell: called with one line about whatever is left out or changed.

    Returns:
        Rows with `prompt` and `completion`, or `messages`, or `text_field`. Beside conversations, `tools` and
        `chat_template_kwargs` where a row has them; beside texts that are made of conversations, `answers`: where in
        the prompt the earlier answers are, as pairs of the first character and the one after the last.

    Raises:
        UserError: if the columns are of no accepted shape, rows lack an answer, or the template can't be used.
    """
    from lfu.data.columns import as_dataset, is_exact, without_nulls

    has_chat = getattr(tokenizer, "chat_template", None) is not None
    chosen = _chosen(template, has_chat)
    names = dataset.column_names
    _refuse_media(dataset)
    typed = [name for name in names if not is_exact(dataset, name)]
    rows = [row | {name: without_nulls(row[name]) for name in typed} for row in dataset]
    shape = _shape(rows, names, text_field)
    if system is not None and shape.own:
        what = " and ".join(shape.columns)
        raise UserError(f"a system message can't be added to {what} rows: put it into the rows themselves")
    end = getattr(tokenizer, "eos_token", None) or ""
    made = list(_read_all(rows, shape, "chat" if shape.own else chosen, system, end))
    conversational = isinstance(next(iter(made[0].values())), list) if made else False
    if conversational and not has_chat:
        raise UserError(
            f"column {shape.columns[-1]!r} holds conversations, and the tokenizer has no chat template: use an "
            "instruct model, --chat_template_path, or give instruction and output columns"
        )
    if "conversations" in shape.columns and (open_ended := sum(_ends_in_a_question(row) for row in rows)):
        tell(f"note: {open_ended} of {len(rows)} conversations end in a question without an answer: it is left out")
    _tell_left_out(rows, names, {*shape.columns, *(shape.beside if conversational else shape.beside_texts)}, tell)
    if shape.own and conversational and template not in ("auto", "chat"):
        tell(
            f"note: the rows are conversations and go through the chat template; --template {template} is for questions"
        )
    if not conversational:
        _begin_once(made, tokenizer, tell)
    filled = {key for row in made for key, value in row.items() if value}  # tools and options: where some row has them
    return as_dataset([{key: value for key, value in row.items() if key in filled} for row in made])


def alpaca_prompt(instruction: str, input: str = "", system: str | None = None) -> str:
    """The Alpaca prompt for one instruction, ending where the response begins."""
    preamble = system or (ALPACA_WITH_INPUT if input else ALPACA)
    middle = f"### Input:\n{input}\n\n" if input else ""
    return f"{preamble}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _chosen(template: str, has_chat: bool) -> str:
    if template not in TEMPLATES:
        raise UserError(f"unknown template {template!r}: choose one of {', '.join(TEMPLATES)}")
    if template == "chat" and not has_chat:
        raise UserError(
            "template chat: the tokenizer has no chat template: use --template alpaca, or an instruct model"
        )
    return ("chat" if has_chat else "alpaca") if template == "auto" else template


# -- shapes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the columns of a data set are, and how a row of it is read.

    Attributes:
        columns: those that make the shape.
        read: a row -> `messages` of `prompt` and `completion` as lists of messages, or texts (TRL's own shapes alone);
            `input` beside them is the text that goes with an instruction.
        own: whether the shape is TRL's, which no template of ours touches.
        beside: the other columns that are used where the rows become conversations.
        beside_texts: ... and where they become texts.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Row]
    own: bool = False
    beside: tuple[str, ...] = (*SYSTEMS, "tools", "chat_template_kwargs")
    beside_texts: tuple[str, ...] = SYSTEMS


def _shape(rows: list[Row], names: list[str], text_field: str) -> Shape:
    columns = set(names)
    if "messages" in columns:
        return Shape(("messages",), _read_messages, own=True)
    if {"prompt", "completion"} <= columns:
        return Shape(("prompt", "completion"), _read_pair, own=True, beside_texts=())
    texts = Shape((text_field,), lambda row: _read_text(row, text_field), own=True, beside=(), beside_texts=())
    if text_field in columns and text_field != "text":
        return texts
    output = next((name for name in OUTPUTS if name in columns), None)
    if "instruction" in columns and output:
        return _instruction(columns, output, any(row.get("history") for row in rows))
    answer = next((name for name in ("answer", "answerKey") if name in columns), None)
    if {"question", "choices"} <= columns and answer:
        return Shape(("question", "choices", answer), lambda row: _read_choice(row, answer))
    if {"question", "answer"} <= columns:
        return Shape(("question", "answer"), lambda row: _asked(row, "question", "answer"))
    if "conversations" in columns:
        return Shape(("conversations",), _read_conversation)
    if text_field in columns and not columns & {"instruction", "question"}:
        return texts
    unknown = {name: did_you_mean(name, _KNOWN - columns) for name in names if name not in _KNOWN}
    hints = "".join(f" Column {name!r}:{hint}" for name, hint in unknown.items() if hint)
    field = "" if text_field == "text" else f" There is no column {text_field!r} (--dataset_text_field)."
    raise UserError(f"data columns {', '.join(names)} are of no known shape. Accepted: {ACCEPTED}.{field}{hints}")


def _instruction(columns: set[str], output: str, history: bool) -> Shape:
    extra = next((name for name in INPUTS if name in columns), None)
    columns_ = ("instruction", *([extra] if extra else []), *(["history"] if "history" in columns else []), output)

    def read(row: Row) -> Row:
        asked = _asked(row, "instruction", output)
        text = text_of(row.get(extra), f"column {extra!r}") if extra else ""
        asked["input"] = text if text.strip() else ""
        if not history:
            return asked
        earlier = [text for pair in _history(row.get("history")) for text in pair]
        turns = messages_of(earlier, "history") if earlier else []
        return {"messages": turns + asked["prompt"] + asked["completion"], "input": asked["input"]}

    return Shape(columns_, read)


def _history(value: Any) -> list[list[str]]:
    pairs = parsed(value, "column 'history'") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"column 'history' is {a(value)}, and must be a list of pairs, question and answer")
    return pairs


def _asked(row: Row, question: str, answer: str) -> Row:
    asked, answered = (text_of(row[name], f"column {name!r}") for name in (question, answer))
    if not asked.strip():
        raise Blank(question, "text")
    if not answered.strip():
        raise Blank(answer)
    return _pair(asked, answered)


def _pair(question: str, answer: str) -> Row:
    return {"prompt": [_said("user", question)], "completion": [_said("assistant", answer)]}


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _read_choice(row: Row, answer_column: str) -> Row:
    """ARC as on the hub (`choices` {text, label}, `answerKey`), or texts with the index of the right one."""
    choices, answer = parsed(row["choices"], "column 'choices'"), row[answer_column]
    question = text_of(row["question"], "column 'question'")
    if isinstance(choices, dict):
        texts, labels = choices.get("text") or [], [str(label) for label in choices.get("label") or []]
    else:
        texts, labels = choices or [], []
    texts = [text_of(text, "column 'choices'") for text in texts]
    letters = string.ascii_uppercase[: len(texts)]
    wanted = text_of(answer, f"column {answer_column!r}").strip()
    if not question.strip():
        raise Blank("question", "text")
    if not wanted:
        raise Blank(answer_column)
    # A label (some ARC rows are labelled 1 to 4), else an index from 0, else a letter.
    found = labels.index(wanted) if wanted in labels else int(wanted) if wanted.isdecimal() else letters.find(wanted)
    if not 0 <= found < len(texts):
        raise ValueError(f"answer {answer!r} is none of the {len(texts)} choices")
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts))
    return _pair(f"{question}\n{listed}", f"{letters[found]}. {texts[found]}")


def _read_conversation(row: Row) -> Row:
    """Texts in turn or ShareGPT's turns; a last question without an answer teaches nothing, and is left out."""
    messages = messages_of(parsed(row["conversations"], "column 'conversations'"), "conversations")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[:1] == ["assistant"] or ("tool" not in roles and roles != ["user", "assistant"] * (len(roles) // 2)):
        raise ValueError("turns must alternate, human first: use the messages shape for anything else")
    if not messages or any(not message["content"].strip() and not message.get("tool_calls") for message in messages):
        raise ValueError("needs at least a question and an answer, none of them blank")
    check_turns(messages, "conversations")
    return {"messages": messages}


def _ends_in_a_question(row: Row) -> bool:
    turns = parsed(row["conversations"], "column 'conversations'")
    last = turns[-1]
    return last.get("from", last.get("role")) in ("human", "user") if isinstance(last, dict) else len(turns) % 2 == 1


def _read_messages(row: Row) -> Row:
    messages = messages_of(parsed(row["messages"], "column 'messages'"), "messages")
    check_turns(messages, "messages")
    return {"messages": messages}


def _read_pair(row: Row) -> Row:
    read: Row = {}
    for column in ("prompt", "completion"):
        value = row[column]
        if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & set(value[0]):
            read[column] = messages_of(value, column)
            continue
        if value == []:
            raise Blank(column, "text" if column == "prompt" else "answer")
        read[column] = text_of(value, f"column {column!r}")
        if not read[column].strip():
            raise Blank(column, "text" if column == "prompt" else "answer")
    if isinstance(read["prompt"], str) != isinstance(read["completion"], str):
        raise ValueError("one of prompt and completion is a text and the other a conversation: make both the same")
    if not isinstance(read["completion"], str):
        check_turns(read["completion"], "completion")
        if any(message.get("weight") == 0 for message in read["completion"]):
            raise ValueError("column 'completion' has an answer with weight 0: use the messages shape for that")
    return read


def _read_text(row: Row, column: str) -> Row:
    text = text_of(row[column], f"column {column!r}")
    if not text.strip():
        raise Blank(column, "text")
    return {column: text}


# -- rows -----------------------------------------------------------------------------------------------------------


def _read_all(rows: Iterable[Row], shape: Shape, template: str, system: str | None, end: str) -> Iterator[Row]:
    """The rows in TRL's shapes. All are texts, or all are conversations.

    Raises:
        UserError: with the number of the row; for rows without text or answer, with the numbers of the first ones.
    """
    blank: dict[tuple[str, str], list[int]] = {}
    first, count = None, 0
    for count, row in enumerate(rows, start=1):
        try:
            made = _rendered(shape.read(row), row, template, system, end)
        except Blank as error:
            blank.setdefault((error.column, error.what), []).append(count)
            continue
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(f"data row {count}: {one_line(error)}") from error
        kind = isinstance(next(iter(made.values())), str)
        first = kind if first is None else first
        if kind != first:
            kinds = ("a conversation", "a text")
            raise UserError(
                f"data row {count}: is {kinds[kind]}, and the first row is {kinds[first]}: make all the same"
            )
        yield made
    for (column, what), bad in blank.items():
        numbers = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise UserError(
            f"{len(bad)} of {count} data rows have no {what} in column {column!r} (row {numbers}): fill or remove them"
        )


def _rendered(read: Row, row: Row, template: str, system: str | None, end: str) -> Row:
    """What was read, in TRL's columns, with the row's system message, tools and options of the chat template."""
    if all(isinstance(value, str) for value in read.values()):
        return read
    own = _system(row)
    extra = read.pop("input", "")
    where = "messages" if "messages" in read else "prompt"
    said = own or system or ""
    if said.strip():
        if read[where][0]["role"] == "system":
            if own:
                raise ValueError("the row has a system message in column 'system', and another as its first turn")
        else:
            read[where] = [_said("system", said), *read[where]]
    if template != "chat":
        return as_text(read.get("messages") or read["prompt"] + read["completion"], template, end, extra)
    if extra:
        asked = [m for m in read[where] if m["role"] == "user"][-1]
        asked["content"] = f"{asked['content']}\n\n{extra}"
    tools, options = tools_of(row.get("tools")), kwargs_of(row.get("chat_template_kwargs"))
    return read | {"tools": tools, "chat_template_kwargs": options}


def _system(row: Row) -> str:
    """The row's own system message, or an empty text."""
    texts = {name: text_of(row.get(name), f"column {name!r}") for name in SYSTEMS}
    given = {text: name for name, text in texts.items() if text.strip()}
    if len(given) > 1:
        raise ValueError(f"the row has two system messages, in columns {' and '.join(map(repr, given.values()))}")
    return next(iter(given), "")


def as_text(messages: list[Message], template: str, end: str, extra: str = "") -> Row:
    """A conversation as texts: the last answer is the completion, and all before it the prompt.

    Args:
        template: `alpaca` or `none`.
        end: behind every answer but the last, where TRL puts it.
        extra: goes with the question that is answered last.

    Returns:
        `prompt` and `completion`; where there are earlier answers, `answers` says where in the prompt they are.

    Raises:
        ValueError: turns or answers that only a chat template can write.
    """
    head, messages = (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else (None, messages)
    if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise ValueError("system and tool turns within a conversation need a chat template")
    if not all(is_learned(message) for message in messages[1::2]):
        raise ValueError("an answer with weight 0 needs a chat template")
    *earlier, (question, answer) = [
        (messages[i]["content"], messages[i + 1]["content"]) for i in range(0, len(messages), 2)
    ]
    prompt, answers = "", []
    for asked, said in earlier:
        prompt += _question(asked, "", template, head, first=not prompt)
        answers.append([len(prompt), len(prompt + said + end)])
        prompt += f"{said}{end}" + ("\n\n" if template == "alpaca" else "\n")
    prompt += _question(question, extra, template, head, first=not prompt)
    return {"prompt": prompt, "completion": answer} | ({"answers": answers} if answers else {})


def _question(asked: str, extra: str, template: str, head: str | None, *, first: bool) -> str:
    """One question as it stands in the text; what heads a conversation stands before the first."""
    if template == "alpaca":
        text = alpaca_prompt(asked, extra, head)
        return text if first else text[text.index("### Instruction:") :]
    return (f"{head}\n" if head and first else "") + asked + (f"\n{extra}\n" if extra else "\n")


def _begin_once(made: list[Row], tokenizer: Tokenizer, tell: Callable[[str], None]) -> None:
    """Takes the beginning-of-sequence token off texts where the tokenizer puts it, too."""
    begin = beginning(tokenizer)
    twice = [row for row in made if begin and next(iter(row.values())).startswith(begin)]
    for row in twice:
        first = next(iter(row))
        while row[first].startswith(begin):
            row[first] = row[first].removeprefix(begin)
    if twice:
        tell(f"note: {len(twice)} of {len(made)} texts begin with {begin}, as the tokenizer does: it is put there once")


def beginning(tokenizer: Tokenizer) -> str:
    """The token that the tokenizer puts in front of a text, or an empty text."""
    bos = getattr(tokenizer, "bos_token", None)
    first = tokenizer("a", verbose=False)["input_ids"][:1] if bos else []
    return str(bos) if bos and first == [tokenizer.bos_token_id] else ""


# -- checks ---------------------------------------------------------------------------------------------------------


def _refuse_media(dataset: Dataset) -> None:
    for column in MEDIA:
        if column in dataset.column_names and any(value for value in dataset[column]):
            raise UserError(
                f"column {column!r} holds pictures or sound, and only text can be learned: leave such rows out, or the "
                "column where the text says it all"
            )


def _tell_left_out(rows: list[Row], names: list[str], used: set[str], tell: Callable[[str], None]) -> None:
    left = [name for name in names if name not in used and any(row[name] not in _NOTHING for row in rows)]
    meant = [name for name in left if name in _MEANT]
    for which, word in ((meant, "warning"), ([name for name in left if name not in _MEANT], "note")):
        if which:
            listed = f"column{'s' * (len(which) > 1)} {', '.join(map(repr, which))}"
            why = ": rows of this shape, in this template, have no place for it" if word == "warning" else ""
            tell(f"{word}: {listed} of the data {'are' if len(which) > 1 else 'is'} left out{why}")


def check_chat_template(tokenizer: Tokenizer) -> None:
    """Raises UserError if the tokenizer has a chat template that can't be used, or that wants more than text.

    Templates come with models: transformers runs them in jinja's sandbox, and what that refuses is said here.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # whatever a template trips over
        raise UserError(
            f"the tokenizer's chat template fails on a question and an answer ({type(error).__name__}: "
            f"{one_line(error)[:200]}): mend chat_template.jinja, or take another model"
        ) from error
