"""Rows of any shape as what TRL trains on: prompt and completion, or a conversation; through which template.

A question becomes the prompt and its answer the completion; a conversation becomes `messages`. `system`, `tools` and
`chat_template_kwargs` go with it. Every other column is dropped, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lfu.data.shapes import INPUTS, SYSTEMS, Row, Shape, ends_open, shape_of
from lfu.data.turns import Blank, Message, is_learned, kwargs_of, said, special_pattern, text_of, tools_of
from lfu.support.errors import UserError, one_line
from lfu.support.words import counted

if TYPE_CHECKING:  # half a second of importing that `lfu train --help` need not wait for
    from datasets import Dataset

    from lfu.support.annotations import Tokenizer

TEMPLATES = ("auto", "chat", "alpaca", "none")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")
# What changes a row's meaning, so that leaving it out is a warning and no note.
_MEANT = {
    *SYSTEMS,
    *INPUTS,
    "instruction",
    "question",
    "tools",
    "history",
    "chat_template_kwargs",
    "functions",
    "options",
    "weight",
}

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


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
    from lfu.data.columns import as_dataset, rows_of

    has_chat = getattr(tokenizer, "chat_template", None) is not None
    chosen = chosen_template(template, has_chat)
    names = dataset.column_names
    _refuse_media(dataset)
    rows = rows_of(dataset)
    shape = shape_of(rows, names, text_field)
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
    beside = (*SYSTEMS, "tools", "chat_template_kwargs") if conversational else () if shape.own else SYSTEMS
    _tell_left_out(rows, names, {*shape.columns, *beside}, tell)
    _tell_how_taken(rows, shape.columns, has_chat and not conversational, tell)
    if not conversational:
        _begin_once(made, tokenizer, tell)
        _tell_special([] if shape.own else made, tokenizer, tell)
    filled = {key for row in made for key, value in row.items() if value}  # tools and options: where some row has them
    return as_dataset([{key: value for key, value in row.items() if key in filled} for row in made])


def _tell_how_taken(rows: list[Row], columns: tuple[str, ...], bare: bool, tell: Callable[[str], None]) -> None:
    """Notes on rows that are not taken as one may think; `bare`: texts, though there is a chat template."""
    if "conversations" in columns and (open_ended := sum(map(ends_open, rows))):
        tell(f"note: {open_ended} of {len(rows)} conversations don't end with an answer: what follows it is left out")
    if bare and columns == ("prompt", "completion"):
        tell(
            "note: prompt and completion are texts: they are taken as they are, without the model's chat template. If "
            "they are a question and its answer, call the columns question and answer"
        )


def alpaca_prompt(instruction: str, input: str = "", system: str | None = None) -> str:
    """The Alpaca prompt for one instruction, ending where the response begins."""
    preamble = system or (ALPACA_WITH_INPUT if input else ALPACA)
    middle = f"### Input:\n{input}\n\n" if input else ""
    return f"{preamble}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def chosen_template(template: str, has_chat: bool) -> str:
    """`chat`, `alpaca` or `none`, whichever a word means. Raises UserError: an unknown one, or chat without one."""
    if template not in TEMPLATES:
        raise UserError(f"unknown template {template!r}: choose one of {', '.join(TEMPLATES)}")
    if template == "chat" and not has_chat:
        raise UserError("template chat: the tokenizer has no chat template: use --template alpaca or an instruct model")
    return ("chat" if has_chat else "alpaca") if template == "auto" else template


def _read_all(rows: Iterable[Row], shape: Shape, template: str, system: str | None, end: str) -> Iterator[Row]:
    """The rows in TRL's shapes, all texts or all conversations. Raises UserError, with the numbers of the bad rows."""
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
            raise UserError(f"data row {count}: is {kinds[kind]}, and the first row is {kinds[first]}: make all alike")
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
    message = own or system or ""
    if message.strip():
        if read[where][0]["role"] == "system":
            if own:
                raise ValueError("the row has a system message in column 'system', and another as its first turn")
        else:
            read[where] = [said("system", message), *read[where]]
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
    texts = [message["content"] for message in messages]
    *earlier, (question, answer) = zip(texts[::2], texts[1::2])
    prompt, answers = "", []
    for asked, answered in earlier:
        prompt += _question(asked, "", template, head, first=not prompt)
        answers.append([len(prompt), len(prompt + answered + end)])
        prompt += f"{answered}{end}" + ("\n\n" if template == "alpaca" else "\n")
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


def _tell_special(made: list[Row], tokenizer: Tokenizer, tell: Callable[[str], None]) -> None:
    """Tells of special tokens in questions and answers; a prompt with earlier answers has their ends in it."""
    special = special_pattern(tokenizer)
    texts = ((row["completion"], "" if "answers" in row else row["prompt"]) for row in made)
    found = [(number, match[0]) for number, each in enumerate(texts, 1) if (match := special.search("\n".join(each)))]
    if found:
        number, name = found[0]
        rows = f"{counted(len(found), 'row')} (first: row {number})"
        tell(f"warning: the tokenizer reads {name} in a text as that special token in {rows}")


def beginning(tokenizer: Tokenizer) -> str:
    """The tokens that the tokenizer puts in front of a text, as text: mostly none or one; GLM's has two."""
    return str(tokenizer.decode(around(tokenizer)[0]))


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts in front of a plain text, and those behind it."""
    made = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, added = list(made["input_ids"]), list(made["special_tokens_mask"])
    return ids[: added.index(0)], ids[len(ids) - added[::-1].index(0) :]


def _refuse_media(dataset: Dataset) -> None:
    for column in MEDIA:
        if column in dataset.column_names and any(value for value in dataset[column]):
            raise UserError(
                f"column {column!r} holds pictures or sound, and only text can be learned: leave such rows out, or the "
                "column where the text says it all"
            )


def _tell_left_out(rows: list[Row], names: list[str], used: set[str], tell: Callable[[str], None]) -> None:
    left = [name for name in names if name not in used and any(row[name] not in _NOTHING for row in rows)]
    why = ": rows of this shape, in this template, have no place for it"
    for word, which, more in (("warning", _MEANT & {*left}, why), ("note", {*left} - _MEANT, "")):
        if listed := ", ".join(repr(name) for name in left if name in which):
            columns, are = ("columns", "are") if len(which) > 1 else ("column", "is")
            tell(f"{word}: {columns} {listed} of the data {are} left out{more}")


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
