"""The shapes that data sets come in: which one the columns are, and how a row of it is read.

instruction (+ input, history), output    Alpaca, Dolly (also `context`, `response`)
question, answer                          GSM8K; with `choices` as well ARC, MMLU and other multiple choice
conversations                             LIMA (texts in turn), ShareGPT (`from`, `value`)
messages; prompt, completion; text        TRL's own
"""

import re
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lfu.data.turns import Blank, a, check_filled, check_turns, is_blank, messages_of, parsed, said, text_of
from lfu.support.errors import UserError, did_you_mean

Row = dict[str, Any]

ACCEPTED = (
    "messages; prompt and completion; instruction (and input) and output; question and answer (and choices); "
    "conversations; or text"
)
INPUTS, OUTPUTS, SYSTEMS = ("input", "context"), ("output", "response"), ("system", "system_prompt")
_KNOWN = {"messages", "prompt", "completion", "instruction", *INPUTS, *OUTPUTS, "question", "answer", "answerKey"} | {
    "choices", "conversations", "text", "tools", "chat_template_kwargs", "history", *SYSTEMS
}  # fmt: skip


PARTNERS = {  # a column -> those of which one must stand beside it
    "prompt": ("completion",), "completion": ("prompt",), "question": ("answer",), "answer": ("question",),
    "instruction": OUTPUTS, "output": ("instruction",), "response": ("instruction",), "choices": ("question",),
}  # fmt: skip
_CONVERSATION = re.compile(r"\s*\[\s*\{\s*\"(role|from|content|value)\"\s*:")  # one that is written as JSON
MOST_NAMES = 8  # of columns, in a message


class Shape(NamedTuple):
    """What the columns of a data set are, and how a row of it is read.

    `read` gives `messages`, or `prompt` and `completion`, as lists of messages or, in TRL's own shapes, texts; `input`
    beside them is the text that goes with an instruction.
    """

    columns: tuple[str, ...]  # those that make the shape
    read: Callable[[Row], Row]
    own: bool = False  # TRL's, which no template of ours touches


def shape_of(rows: list[Row], names: list[str], text_field: str) -> Shape:
    """The shape of rows with these columns; UserError where it is none of those above."""
    first = lambda known: next((name for name in known if name in names), None)
    output, extra, answer = first(OUTPUTS), first(INPUTS), first(("answer", "answerKey"))
    texts = Shape((text_field,), lambda row: {text_field: _filled(row, text_field, "text")}, own=True)
    if "messages" in names:
        return Shape(("messages",), _read_messages, own=True)
    if {"prompt", "completion"} <= {*names}:
        return Shape(("prompt", "completion"), _read_pair, own=True)
    if text_field in names and text_field != "text":
        return texts
    if "instruction" in names and output:
        columns = [name for name in ("instruction", extra, "history", output) if name in names]
        history = any(row.get("history") for row in rows)
        return Shape(tuple(filter(None, columns)), lambda row: _read_instruction(row, extra, output, history))
    if "question" in names and "choices" in names and answer:
        return Shape(("question", "choices", answer), lambda row: _read_choice(row, answer))
    if "question" in names and "answer" in names:
        return Shape(("question", "answer"), lambda row: _asked(row, "question", "answer"))
    if "conversations" in names:
        return Shape(("conversations",), _read_conversation)
    if text_field in names and not {"instruction", "question"} & {*names}:
        return texts
    raise UserError(_no_shape(names, text_field))


def _no_shape(names: list[str], text_field: str) -> str:
    """What is missing from columns that make no training rows, and which would."""
    told = names[:MOST_NAMES] + [f"{len(names) - MOST_NAMES} more"] * (len(names) > MOST_NAMES)
    hints = [] if text_field == "text" else [f"There is no column {text_field!r} (--dataset_text_field)."]
    for name in names[:MOST_NAMES]:
        partners = PARTNERS.get(name, ())
        if partners and not {*partners} & {*names}:
            hints.append(f"Beside {name!r} there is no column {' or '.join(map(repr, partners))}.")
        elif name not in _KNOWN and (close := did_you_mean(name, _KNOWN - {*names})):
            hints.append(f"Column {name!r}:{close}")
    one = len(names) == 1
    columns = f"the data has the column{'s' * (not one)} {', '.join(told)}"
    return " ".join([f"{columns}, which make{'s' * one} no training rows.", *hints, f"Needed: {ACCEPTED}."])


def _read_instruction(row: Row, extra: str | None, output: str, history: bool) -> Row:
    asked = _asked(row, "instruction", output)
    text = text_of(row.get(extra), f"column {extra!r}") if extra else ""
    asked["input"] = text if text.strip() else ""
    if not history:
        return asked
    pairs = parsed(row.get("history"), "column 'history'") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"column 'history' is {a(row.get('history'))}, and must be a list of pairs of texts")
    earlier = [text for pair in pairs for text in pair]
    turns = messages_of(earlier, "history") if earlier else []
    return {"messages": turns + asked["prompt"] + asked["completion"], "input": asked["input"]}


def _filled(row: Row, column: str, what: str = "answer") -> str:
    """The text of a cell. Raises Blank: there is none."""
    text = text_of(row[column], f"column {column!r}")
    if not text.strip():
        raise Blank(column, what)
    return text


def _read_messages(row: Row) -> Row:
    messages = messages_of(parsed(row["messages"], "column 'messages'"), "messages")
    check_turns(messages, "messages")
    return {"messages": messages}


def _asked(row: Row, question: str, answer: str) -> Row:
    return _pair(_filled(row, question, "text"), _filled(row, answer))


def _pair(question: str, answer: str) -> Row:
    return {"prompt": [said("user", question)], "completion": [said("assistant", answer)]}


def _read_choice(row: Row, answer_column: str) -> Row:
    question, _ = _filled(row, "question", "text"), _filled(row, answer_column)
    texts, right = choice_of(row, row[answer_column])
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts))
    return _pair(f"{question}\n{listed}", f"{string.ascii_uppercase[right]}. {texts[right]}")


def choice_of(row: Mapping[str, Any], answer: Any) -> tuple[list[str], int]:
    """The choices of a multiple-choice row, as texts, and the index of the right one.

    `choices` are texts, ARC's `{"text": [...], "label": [...]}`, or a list of `{"text": ..., "label": ...}`. The row's
    `answer` is one of the labels (some of ARC's rows are labelled 1 to 4), an index from 0, a letter, or the text of a
    choice.

    Raises ValueError: fewer than two choices, or more than there are letters; an answer that is none of them, or two.
    """
    where, labels = "column 'choices'", list[str]()
    choices: Any = parsed(row.get("choices"), where)
    if isinstance(choices, Mapping):
        choices, labels = choices.get("text"), [str(label) for label in choices.get("label") or []]
    elif isinstance(choices, list) and all(isinstance(each, Mapping) and "label" in each for each in choices):
        choices, labels = [each.get("text") for each in choices], [str(each["label"]) for each in choices]
    texts = [text_of(text, where) for text in choices] if isinstance(choices, list | tuple) else []
    if not 2 <= len(texts) <= len(string.ascii_uppercase) or not all(map(str.strip, texts)):
        raise ValueError(f"no list of at least two choices (at most 26), none of them blank, in {where}")
    wanted = text_of(answer, "the answer").strip()
    if wanted in labels[: len(texts)]:
        return texts, labels.index(wanted)
    place = int(wanted) if wanted.isdecimal() else string.ascii_uppercase.find(wanted) if len(wanted) == 1 else -1
    found = {place} if 0 <= place < len(texts) else set()
    if type(answer) is not int:  # a number is an index, whatever numbers the choices are
        found |= {place for place, text in enumerate(texts) if text.strip() == wanted}
    if not found:
        raise ValueError(f"answer {answer!r} is none of the {len(texts)} choices")
    if len(found) > 1:
        raise ValueError(f"answer {answer!r} fits two choices, by text or place: give the index from 0, as a number")
    return texts, found.pop()


def _read_conversation(row: Row) -> Row:
    """Texts in turn or ShareGPT's turns; what follows the last answer teaches nothing, and is left out."""
    messages = messages_of(parsed(row["conversations"], "column 'conversations'"), "conversations")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[:1] == ["assistant"] or ("tool" not in roles and roles != ["user", "assistant"] * (len(roles) // 2)):
        raise ValueError("turns must alternate, human first: use the messages shape for anything else")
    if not messages or any(map(is_blank, messages)):
        raise ValueError("needs at least a question and an answer, none of them blank")
    check_turns(messages, "conversations")
    return {"messages": messages}


def ends_open(row: Row) -> bool:
    """Whether the last turn of `conversations` is no answer, such as a question that nobody answers."""
    return messages_of(parsed(row["conversations"], ""), "conversations")[-1]["role"] != "assistant"


def _read_pair(row: Row) -> Row:
    read: Row = {}
    for column, what in (("prompt", "text"), ("completion", "answer")):
        value = row[column]
        if isinstance(value, str) and _CONVERSATION.match(value):  # as in a CSV file
            value = parsed(value, f"column {column!r}")
        if isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & set(value[0]):
            read[column] = messages_of(value, column)
        else:
            read[column] = _filled({column: "" if value == [] else value}, column, what)
    prompt, completion = read["prompt"], read["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError("one of prompt and completion is a text and the other a conversation: make both the same")
    if not isinstance(completion, str):
        check_filled(prompt, "prompt")
        check_turns(completion, "completion")
        if any(message.get("weight") == 0 for message in completion):
            raise ValueError("column 'completion' has an answer with weight 0: use the messages shape for that")
    return read
