"""Instruction Modelling: the loss is on the instruction too, and never on the template around both."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset

from lfu.data.templates import ALPACA, ALPACA_WITH_INPUT
from lfu.methods.method import Method, Preparation
from lfu.methods.rows import end_tokens, shape_of, template_arguments
from lfu.support.errors import UserError

IGNORED = -100
MARK = "QzXjWvMark"  # stands where a message's text stands; no template and no text has it
# What of a message is text that a template writes out; the last two are an assistant's reasoning.
TEXTS = ("content", "reasoning_content", "thinking")
_ALPACA_FRAME = re.compile(
    rf"\A(?:{re.escape(ALPACA)}|{re.escape(ALPACA_WITH_INPUT)})|\s*^### (?:Instruction|Input|Response):\n", re.MULTILINE
)

Span = tuple[int, int]  # first character, and the one after the last
Message = dict[str, Any]


@dataclass
class InstructionModelling(Method):
    """`l = - (1/N) sum_t log p(x_t | x_<t)` over the N tokens of instruction and answer, template tokens left out.

    With the loss:

    - the content of every message of the data, whatever its role; a system message in the data counts as instruction
      (the authors' code, too, leaves out the role markers alone), one that the template brings along does not;
    - what ends an assistant's turn (SFT trains it, too, so that the model learns to stop): the tokens from the
      answer's end to the end-of-turn token;
    - of prompts that are a text, all but Alpaca's frame: its first paragraph and its headings;
    - a token that lies across the border of content and template.

    Without: role markers, generation prompts, tool descriptions, default system prompts, the beginning-of-sequence
    token, line breaks between turns.

    TRL's `completion_only_loss=False` differs: there every token of the template carries loss as well. Here the rows
    are tokenised with their labels before TRL sees them, to the same `input_ids` as TRL's own; cutting to `max_length`,
    packing and evaluation rows stay TRL's. `completion_only_loss` then speaks of the evaluation rows alone; left at
    None they are scored as without this method.
    """

    name: ClassVar[str] = "im"
    summary: ClassVar[str] = "instruction modelling: the loss is on the prompt, too"
    source: ClassVar[str] = "Shi et al., NeurIPS 2024, arXiv 2405.14394"
    protects: ClassVar[str] = "against overfitting short answers, by more to predict in each row"
    places: ClassVar[tuple[str, ...]] = ("labels",)

    def configure(self, args: Any) -> None:
        if args.assistant_only_loss:
            raise ValueError(
                "method='im' puts the loss on the user's turns, too, and assistant_only_loss=True takes it off them: "
                "drop one of the two"
            )
        if args.chat_template_path:
            raise ValueError(
                "method='im' labels the rows before chat_template_path is read: set the tokenizer's "
                "chat_template instead"
            )

    def rows(self, rows: Dataset, run: Preparation) -> Dataset:
        args, tokenizer = run.args, run.tokenizer
        shape = shape_of(rows, self.name, args.dataset_text_field)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"method='im' finds the instruction by character offsets, which {type(tokenizer).__name__} does not "
                "give: use a fast tokenizer (a PreTrainedTokenizerFast)"
            )
        if args.completion_only_loss is None:  # TRL would go by the training rows, whose shape changes here
            args.completion_only_loss = shape == "prompt"
        eos = args.eos_token or tokenizer.eos_token or ""
        ends, special, field = set(end_tokens(run)), _special(tokenizer), args.dataset_text_field

        def label(row: dict[str, Any], index: int) -> dict[str, list[int]]:
            messages = _messages(row)
            if messages is None:
                text, spans = _plain(row, field, eos)
                return _labelled(_encode(tokenizer, text, special=True), spans)
            return _chat(messages, row, tokenizer, ends, special, f"data row {index + 1}")

        labelled = rows.map(
            label, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False,
            desc="Labelling instruction and answer",
        )  # fmt: skip
        total = sum(len(row["labels"]) for row in labelled)
        kept = total - sum(row["labels"].count(IGNORED) for row in labelled)
        run.say(f"im: the loss is on {kept:,} of {total:,} tokens, those of instruction and answer")
        return labelled


# -- texts -----------------------------------------------------------------------------------------------------------


def _plain(row: dict[str, Any], text_field: str, eos: str) -> tuple[str, list[Span]]:
    """The text that TRL trains on, and where it is instruction or answer."""
    last = row["completion"] if "prompt" in row else row[text_field]
    last = last if last.endswith(eos) else last + eos
    if "prompt" in row:
        return row["prompt"] + last, [
            *content_of_prompt(row["prompt"]),
            (len(row["prompt"]), len(row["prompt"] + last)),
        ]
    return last, content_of_prompt(last)


def content_of_prompt(prompt: str) -> list[Span]:
    """Where a text is not Alpaca's frame; all of it where it is in no such frame."""
    if "### Instruction:\n" not in prompt or "### Response:\n" not in prompt:
        return [(0, len(prompt))]
    spans, start = [], 0
    for frame in _ALPACA_FRAME.finditer(prompt):
        spans.append((start, frame.start()))
        start = frame.end()
    return [span for span in [*spans, (start, len(prompt))] if span[0] < span[1]]


# -- conversations ---------------------------------------------------------------------------------------------------


def _messages(row: dict[str, Any]) -> list[Message] | None:
    """The row's messages; None for a row of texts."""
    if "messages" in row:
        return row["messages"]
    if isinstance(row.get("prompt"), list):
        return row["prompt"] + row["completion"]
    return None


@dataclass(frozen=True)
class Turn:
    """Where a message's texts stand in what the chat template made of the conversation."""

    role: str
    spans: list[Span]


def _chat(
    messages: list[Message], row: dict[str, Any], tokenizer: Any, ends: set[int], special: set[int], where: str
) -> dict[str, list[int]]:
    options = template_arguments(row)
    render = lambda messages: tokenizer.apply_chat_template(messages, tokenize=False, **options)
    text = render(messages)
    turns = content_of_turns(messages, text, render, where)
    encoded = _encode(tokenizer, text, special=False)
    spans = [span for turn in turns for span in turn.spans]
    return _labelled(encoded, spans + _ends_of_turns(turns, encoded, ends, special))


def content_of_turns(
    messages: list[Message], text: str, render: Callable[[list[Message]], str], where: str
) -> list[Turn]:
    """Where each message's content stands in `text`, which is `render(messages)`.

    The template is asked again with a mark in place of one content: what comes before and after the mark is the
    template's, what the text has between the two is the content, stripped or changed as the template does it. Where a
    template writes the rest differently, too, because of what the content says, the content is searched for behind the
    message before, and taken if it is there once.

    Raises:
        UserError: a content that isn't a text, or isn't found; the message begins with `where`.
    """
    turns, behind = [], 0
    for number, message in enumerate(messages):
        name = f"{where}: message {number + 1} ({message.get('role')})"
        if message.get("tool_calls"):
            raise UserError(f"{name} calls a tool: im can't tell the call's tokens from the template's; leave it out")
        if not isinstance(message.get("content") or "", str):
            raise UserError(f"{name} has a content that is not a text: im can't label it; give a text")
        spans = []
        for key in TEXTS:
            if not isinstance(message.get(key), str) or not message[key].strip():
                continue
            marked = render([*messages[:number], {**message, key: MARK}, *messages[number + 1 :]])
            span = _around_mark(text, marked) or _searched(text, message[key].strip(), behind)
            if span:
                spans.append(span)
            elif key == "content":  # earlier reasoning is mostly left out by the template
                raise UserError(
                    f"{name} can't be found in what the chat template makes of the row: give its reasoning as "
                    "reasoning_content, or leave out what the template leaves out"
                )
        turns.append(Turn(str(message.get("role")), sorted(spans)))
        behind = max([behind, *(end for _, end in spans)])
    return turns


def _around_mark(text: str, marked: str) -> Span | None:
    before, mark, after = marked.partition(MARK)
    fits = mark and MARK not in after and len(before) + len(after) <= len(text)
    if fits and text.startswith(before) and text.endswith(after):
        return len(before), len(text) - len(after)
    return None


def _searched(text: str, content: str, start: int) -> Span | None:
    place = text.find(content, start)
    alone = place >= 0 and text.find(content, place + 1) < 0  # else it may be a piece of the template, or of a turn
    return (place, place + len(content)) if alone else None


def _ends_of_turns(turns: list[Turn], encoded: Any, ends: set[int], special: set[int]) -> list[Span]:
    """From the end of each assistant's content to the end of its end-of-turn token, where the template has one.

    That is a token of `ends`, or the first special token behind the conversation's last answer: a base model's
    tokenizer may name another end than its chat template writes.
    """
    tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"]))
    starts = [turn.spans[0][0] for turn in turns if turn.spans]
    if turns[-1].role == "assistant" and turns[-1].spans:
        last = turns[-1].spans[-1][1]
        ends = ends | {next((token for token, (start, _) in tokens if token in special and start >= last), -1)}
    found = []
    for turn in turns:
        if turn.role != "assistant" or not turn.spans:
            continue
        begin = turn.spans[-1][1]
        limit = min((start for start in starts if start >= begin), default=float("inf"))
        stop = next((end for token, (start, end) in tokens if token in ends and begin <= start < limit), begin)
        found.append((begin, stop))
    return found


# -- tokens ----------------------------------------------------------------------------------------------------------


def _encode(tokenizer: Any, text: str, *, special: bool) -> Any:
    """Token ids and their character offsets; `special` as TRL has it: for texts, not for what a template wrote."""
    return tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)


def _special(tokenizer: Any) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _labelled(encoded: Any, spans: Sequence[Span]) -> dict[str, list[int]]:
    """`input_ids`, and `labels` that are -100 wherever a token has no character in one of the spans."""
    labels = [
        token if any(start < last and end > first for first, last in spans) else IGNORED
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"])
    ]
    return {"input_ids": list(encoded["input_ids"]), "labels": labels}
