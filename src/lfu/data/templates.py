"""From the shapes that data sets come in to what TRL trains on: prompt and completion, or a conversation.

Question-like rows become a prompt and a completion, so that the loss is on the answer alone:

    instruction (+ input), output    Alpaca, Dolly (also `context`, `response`)
    question, answer                 GSM8K; with `choices` as well ARC, MMLU and other multiple choice
    conversations                    LIMA (texts in turn), ShareGPT (`from`, `value`)

`messages`, `prompt` + `completion` and `text` are TRL's own shapes and stay as they are.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lfu.support.errors import UserError, did_you_mean, one_line

if TYPE_CHECKING:  # half a second of importing that `lfu train --help` need not wait for
    from datasets import Dataset

    from lfu.support.annotations import Tokenizer

TEMPLATES = ("auto", "chat", "alpaca", "none")
ACCEPTED = (
    "messages; prompt and completion; instruction (and input) and output; question and answer (and choices); "
    "conversations; text"
)
# TRL reads these beside the conversation; every other column is dropped, lest TRL take it for something it is not.
COMPANIONS = ("tools", "chat_template_kwargs")
INPUTS, OUTPUTS = ("input", "context"), ("output", "response")

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

# A row as turns: question, answer, question, ..., answer. `input` goes with the first question.
Turns = list[str]
Reader = Callable[[dict[str, Any]], tuple[Turns, str]]


def to_training_rows(
    dataset: Dataset, *, template: str = "auto", tokenizer: Tokenizer, system: str | None = None
) -> Dataset:
    """Turns a data set of any accepted shape into what `SFTTrainer` takes.

    Args:
        dataset: the rows, as `load_rows` gives them.
        template: how a question becomes a prompt: `chat` (the tokenizer's chat template), `alpaca` (for base models),
            `none` (the bare question and a line break), or `auto`: chat if the tokenizer has a chat template, else
            alpaca.
        tokenizer: looked at for its chat template.
        system: system message (chat), or the text that replaces Alpaca's first paragraph.

    Returns:
        Rows with `prompt` and `completion`, or `messages`, or `text`.

    Raises:
        UserError: if the columns are of no accepted shape, rows lack an answer, or the template can't be used.
    """
    if template not in TEMPLATES:
        raise UserError(f"unknown template {template!r}: choose one of {', '.join(TEMPLATES)}")
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    if template == "chat" and not has_chat:
        raise UserError(
            "template chat: the tokenizer has no chat template: use --template alpaca, or an instruct model"
        )
    if template == "auto":
        template = "chat" if has_chat else "alpaca"
    columns = set(dataset.column_names)
    own = _trl_columns(columns)
    if own:
        return _keep(dataset, own, has_chat, system)
    reader, question, answer = _reader(columns, dataset.column_names)
    _refuse_blank(dataset, question)
    _refuse_blank(dataset, answer)
    return _render_rows(dataset, reader, template, system)


def alpaca_prompt(instruction: str, input: str = "", system: str | None = None) -> str:
    """The Alpaca prompt for one instruction, ending where the response begins."""
    preamble = system or (ALPACA_WITH_INPUT if input else ALPACA)
    middle = f"### Input:\n{input}\n\n" if input else ""
    return f"{preamble}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


# -- TRL's own shapes -----------------------------------------------------------------------------------------------


def _trl_columns(columns: set[str]) -> tuple[str, ...]:
    for shape in (("messages",), ("prompt", "completion"), ("text",)):
        if columns.issuperset(shape) and not (shape == ("text",) and _question_columns(columns)):
            return shape
    return ()


def _keep(dataset: Dataset, own: tuple[str, ...], has_chat: bool, system: str | None) -> Dataset:
    if system is not None:
        raise UserError(f"a system message can't be added to {' and '.join(own)} rows: put it into the rows themselves")
    dataset = dataset.select_columns([*own, *(c for c in COMPANIONS if c in dataset.column_names and own != ("text",))])
    for column in own:
        _refuse_blank(dataset, column)
    _refuse_other_kinds(dataset, own)
    is_chat = isinstance(dataset[0][own[-1]], list)
    if is_chat and not has_chat:
        raise UserError(
            f"column {own[-1]!r} holds conversations, and the tokenizer has no chat template: "
            "use an instruct model, or give instruction and output columns"
        )
    return dataset


# -- shapes that are turned into turns -------------------------------------------------------------------------------


def _question_columns(columns: set[str]) -> bool:
    return bool(columns & {"instruction", "question", "conversations"})


def _reader(columns: set[str], listed: list[str]) -> tuple[Reader, str, str]:
    """The function that reads a row of this shape as turns, and the names of its question and answer columns."""
    output = next((name for name in OUTPUTS if name in columns), None)
    if "instruction" in columns and output:
        extra = next((name for name in INPUTS if name in columns), None)
        return (
            lambda row: ([_text(row["instruction"]), _text(row[output])], _text(row.get(extra))),
            "instruction",
            output,
        )
    answer = next((name for name in ("answer", "answerKey") if name in columns), None)
    if {"question", "choices"} <= columns and answer:
        return lambda row: (_multiple_choice(row, answer), ""), "question", answer
    if {"question", "answer"} <= columns:
        return lambda row: ([_text(row["question"]), _text(row["answer"])], ""), "question", "answer"
    if "conversations" in columns:
        return lambda row: (_conversation(row["conversations"]), ""), "conversations", "conversations"
    unknown = {name: did_you_mean(name, _KNOWN - columns) for name in listed if name not in _KNOWN}
    hints = "".join(f" Column {name!r}:{hint}" for name, hint in unknown.items() if hint)
    raise UserError(f"data columns {', '.join(listed)} are of no known shape. Accepted: {ACCEPTED}.{hints}")


_KNOWN = {"messages", "prompt", "completion", "instruction", "input", "context", "output", "response", "question"} | {
    "answer", "answerKey", "choices", "conversations", "text"
}  # fmt: skip


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _multiple_choice(row: dict[str, Any], answer_column: str) -> Turns:
    """ARC as on the hub (`choices` {text, label}, `answerKey`), or texts with the index of the right one."""
    choices, answer = row["choices"], row[answer_column]
    if isinstance(choices, dict):
        texts, labels = choices.get("text") or [], [str(label) for label in choices.get("label") or []]
    else:
        texts, labels = choices or [], []
    letters = string.ascii_uppercase[: len(texts)]
    wanted = str(answer).strip()
    # A label (some ARC rows are labelled 1 to 4), else an index from 0, else a letter.
    found = labels.index(wanted) if wanted in labels else int(wanted) if wanted.isdecimal() else letters.find(wanted)
    if not wanted or not 0 <= found < len(texts):
        raise ValueError(f"answer {answer!r} is none of the {len(texts)} choices")
    listed = "\n".join(f"{letter}. {_text(text)}" for letter, text in zip(letters, texts))
    return [f"{_text(row['question'])}\n{listed}", f"{letters[found]}. {_text(texts[found])}"]


def _conversation(turns: Any) -> Turns:
    """Texts in turn, user first (LIMA), or `from` and `value` (ShareGPT, without system turns)."""
    if turns and not isinstance(turns, list):
        raise ValueError(f"conversations must be a list of turns, got {type(turns).__name__}")
    if turns and isinstance(turns[0], dict):
        user = [turn.get("from") in ("human", "user") for turn in turns]
        if user != [i % 2 == 0 for i in range(len(turns))]:
            raise ValueError("turns must alternate, human first: use the messages shape for anything else")
        turns = [turn.get("value") for turn in turns]
    texts = [_text(turn) for turn in turns]
    if len(texts) % 2:
        texts = texts[:-1]  # a last question without an answer teaches nothing
    if not texts or not all(texts):
        raise ValueError("needs at least a question and an answer, none of them blank")
    return texts


def _render_rows(dataset: Dataset, reader: Reader, template: str, system: str | None) -> Dataset:
    rows = []
    for number, row in enumerate(dataset, start=1):
        try:
            turns, extra = reader(row)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"data row {number}: {one_line(error)}") from error
        rows.append(_render(turns, extra, template, system))
    from datasets import Dataset

    return Dataset.from_list(rows)


def _render(turns: Turns, extra: str, template: str, system: str | None) -> dict[str, Any]:
    """One row's prompt and completion. Earlier turns of a conversation are part of the prompt."""
    if template == "chat":
        first = f"{turns[0]}\n\n{extra}" if extra else turns[0]
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate([first, *turns[1:]])]
        head = [{"role": "system", "content": system}] if system else []
        return {"prompt": head + messages[:-1], "completion": messages[-1:]}
    if template == "alpaca":
        prompt = alpaca_prompt(turns[0], extra, system)
        for answer, question in zip(turns[1:-1:2], turns[2::2]):
            prompt += f"{answer}\n\n### Instruction:\n{question}\n\n### Response:\n"
    else:
        parts = [*([system] if system else []), f"{turns[0]}\n{extra}" if extra else turns[0], *turns[1:-1]]
        prompt = "".join(f"{part}\n" for part in parts)
    # TRL appends the end-of-sequence token to a completion that is a text.
    return {"prompt": prompt, "completion": turns[-1]}


# -- checks ---------------------------------------------------------------------------------------------------------


def _refuse_blank(dataset: Dataset, column: str) -> None:
    """Raises UserError if the column is missing, None or blank in any row, with the first row numbers."""
    bad = [number for number, value in enumerate(dataset[column], start=1) if _is_blank(value, column)]
    if bad:
        what = "text" if column in ("prompt", "instruction", "question", "text") else "answer"
        first = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise UserError(
            f"{len(bad)} of {len(dataset)} data rows have no {what} in column {column!r} "
            f"(row {first}): fill or remove them"
        )


def _refuse_other_kinds(dataset: Dataset, own: tuple[str, ...]) -> None:
    """Raises UserError unless every cell is a text, or every one a conversation; `messages` are conversations."""
    kinds = {_kind(value) for column in own for value in dataset[column]}
    wanted = {"messages": {"conversation"}, "text": {"text"}}.get(own[0], {"text", "conversation"})
    if len(kinds) == 1 and kinds <= wanted:
        return
    odd = kinds - wanted
    what = f"hold {' and '.join(sorted(kinds))}" if not odd else f"hold {min(odd)}"
    raise UserError(
        f"data columns {' and '.join(own)} {what}, and must all be "
        f"{' or all '.join(f'{one}s' for one in sorted(wanted, reverse=True))}; a conversation is a list of "
        '{"role": ..., "content": ...}'
    )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value):
        return "conversation"
    return f"a {type(value).__name__}"


def _is_blank(value: Any, column: str) -> bool:
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "role" in value[-1]:
        last = value[-1]
        if column != "prompt" and last.get("role") != "assistant":
            return True  # a conversation that ends with the user has no answer to learn
        return not (last.get("tool_calls") or _text(last.get("content")))
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


def count_too_long(dataset: Dataset, tokenizer: Tokenizer, max_length: int | None) -> int:
    """How many rows of `to_training_rows` have more than `max_length` tokens, and will be cut off there.

    Args:
        dataset: rows of one of TRL's shapes.
        tokenizer: the model's.
        max_length: the cut-off; None means that nothing is cut, so 0 rows.
    """
    if max_length is None:
        return 0
    too_long = 0
    conversational = isinstance(dataset[0].get("messages", dataset[0].get("prompt")), list)
    for start in range(0, len(dataset), 1000):
        texts = [
            whole_text(row, tokenizer, tokenizer.eos_token or "")
            for row in dataset.select(range(start, min(start + 1000, len(dataset))))
        ]
        # A chat template writes the special tokens itself; before a plain text TRL lets the tokenizer add its own.
        encoded = tokenizer(texts, add_special_tokens=not conversational, verbose=False)["input_ids"]
        too_long += sum(len(ids) > max_length for ids in encoded)
    return too_long


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


def whole_text(row: dict[str, Any], tokenizer: Tokenizer, end: str) -> str:
    """A training row as one text; `end` is put behind one that no chat template writes."""
    parts = [row[column] for column in ("messages", "prompt", "completion", "text") if column in row]
    if isinstance(parts[0], list):
        messages = [message for part in parts for message in part]
        try:
            return tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
        except Exception as error:  # whatever a template trips over
            shown = one_line(messages)
            raise UserError(
                f"the chat template can't write a data row ({type(error).__name__}: {one_line(error)[:200]}); the row: "
                f"{shown[:200]}"
            ) from error
    return "".join(parts) + end
