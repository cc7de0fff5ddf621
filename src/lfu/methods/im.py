"""Instruction Modelling: the loss is on the instruction too, and never on the template around both."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from datasets import Dataset

from lfu.data.templates import ALPACA, ALPACA_WITH_INPUT
from lfu.data.turns import MARK
from lfu.methods.examples import IGNORED
from lfu.methods.method import Method
from lfu.methods.rows import Message, Row, messages_of, shape_of, template_arguments
from lfu.methods.run import Preparation
from lfu.methods.writing import end_tokens
from lfu.support.errors import UserError

# What of a message is text that a template writes out; the last two are an assistant's reasoning.
TEXTS = ("content", "reasoning_content", "thinking")
_ALPACA_FRAME = re.compile(
    rf"\A(?:{re.escape(ALPACA)}|{re.escape(ALPACA_WITH_INPUT)})|\s*^### (?:Instruction|Input|Response):\n", re.MULTILINE
)

Span = tuple[int, int]  # first character, and the one after the last
Turn = tuple[str, list[Span]]  # role of a message, and where its texts stand in what the template wrote


class InstructionModelling(Method):
    """`l = - (1/N) sum_t log p(x_t | x_<t)` over the N tokens of instruction and answer, template tokens left out.

    With the loss: the content of every message of the data, whatever its role; what ends an assistant's turn; all of a
    prompt that is a text, but for Alpaca's frame; a token across the border of content and template. Without it: role
    markers, generation prompts, tool descriptions, the template's own system prompt, the beginning-of-sequence token,
    and answers with weight 0.

    The rows are tokenised with their labels before TRL sees them, to the same `input_ids` as TRL's own; cutting,
    packing and evaluation rows stay TRL's, and `completion_only_loss` speaks of the evaluation rows alone.
    """

    name = "im"
    summary = "instruction modelling: the loss is on the prompt, too"
    source = "Shi et al., NeurIPS 2024, arXiv 2405.14394"
    protects = "against overfitting short answers, by more to predict in each row"
    places = ("labels",)

    def configure(self, args: Any) -> None:
        if args.assistant_only_loss:
            raise ValueError("im puts a loss on the user's turns, and assistant_only_loss=True takes it off: drop one")
        if args.chat_template_path:
            raise ValueError("im can't wait for chat_template_path: set the tokenizer's chat_template instead")

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
        ends = set(end_tokens(run))

        def label(row: Row, index: int) -> dict[str, list[int]]:
            messages, turns = messages_of(row), []
            if messages is None:
                text, spans = _plain(row, args.dataset_text_field, eos)
            else:
                options = template_arguments(row)
                render = lambda messages: tokenizer.apply_chat_template(messages, tokenize=False, **options)
                text = render(messages)
                turns = turns_of(messages, text, render, f"data row {index + 1}")
                spans = [span for _, found in turns for span in found]
            # special tokens as TRL has them: for texts, not for what a template wrote
            encoded = tokenizer(text, add_special_tokens=messages is None, return_offsets_mapping=True, verbose=False)
            ids, places = list(encoded["input_ids"]), encoded["offset_mapping"]
            spans += _ends_of_turns(turns, list(zip(ids, places)), ends)
            inside = lambda start, end: any(start < last and end > first for first, last in spans)
            labels = [token if inside(*place) else IGNORED for token, place in zip(ids, places)]
            return {"input_ids": ids, "labels": labels}

        labelled = rows.map(
            label, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False,
            desc="Labelling instruction and answer",
        )  # fmt: skip
        total = sum(len(row["labels"]) for row in labelled)
        learned = total - sum(row["labels"].count(IGNORED) for row in labelled)
        run.say(f"im: the loss is on {learned:,} of {total:,} tokens, those of instruction and answer")
        return labelled


def _plain(row: Row, text_field: str, eos: str) -> tuple[str, list[Span]]:
    """The text that TRL trains on, and where it is instruction or answer."""
    prompt, last = row.get("prompt", ""), row["completion"] if "prompt" in row else row[text_field]
    text = prompt + last.removesuffix(eos) + eos
    spans = [*content_of_prompt(prompt), (len(prompt), len(text))] if "prompt" in row else content_of_prompt(text)
    return text, spans


def content_of_prompt(prompt: str) -> list[Span]:
    """Where a text is not Alpaca's frame; all of it where it is in no such frame."""
    if "### Instruction:\n" not in prompt or "### Response:\n" not in prompt:
        return [(0, len(prompt))]
    frames = [(0, 0), *(frame.span() for frame in _ALPACA_FRAME.finditer(prompt)), (len(prompt), len(prompt))]
    return [(end, start) for (_, end), (start, _) in pairwise(frames) if end < start]


def turns_of(messages: list[Message], text: str, render: Callable[[list[Message]], str], where: str) -> list[Turn]:
    """Where each message's content stands in `text`, which is `render(messages)`.

    The template is asked again with a mark in place of one content: what comes before and after the mark is the
    template's, what the text has between the two is the content, stripped or changed as the template does it. Where a
    template writes the rest differently, too, because of what the content says, the content is searched for behind the
    message before, and taken if it is there once.

    Raises UserError: a content that isn't a text, or isn't found; the message begins with `where`.
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
            span = _span_of(message[key].strip(), text, marked, behind)
            if span:
                spans.append(span)
            elif key == "content":  # earlier reasoning is mostly left out by the template
                raise UserError(
                    f"{name} can't be found in what the chat template makes of the row: give its reasoning as "
                    "reasoning_content, or leave out what the template leaves out"
                )
        behind = max([behind, *(end for _, end in spans)])
        turns.append((str(message.get("role")), [] if message.get("weight") == 0 else sorted(spans)))
    return turns


def _span_of(content: str, text: str, marked: str, behind: int) -> Span | None:
    before, mark, after = marked.partition(MARK)
    fits = mark and MARK not in after and len(before) + len(after) <= len(text)
    if fits and text.startswith(before) and text.endswith(after):
        return len(before), len(text) - len(after)
    place = text.find(content, behind)
    alone = place >= 0 and text.find(content, place + 1) < 0  # else it may be a piece of the template, or of a turn
    return (place, place + len(content)) if alone else None


def _ends_of_turns(turns: list[Turn], tokens: Sequence[tuple[int, Span]], ends: set[int]) -> list[Span]:
    """From the end of each assistant's content to the end of its end-of-turn token, one of `ends`, if it has one."""
    answers = [spans[-1][1] for role, spans in turns if role == "assistant" and spans]
    starts = [spans[0][0] for _, spans in turns if spans]
    found = []
    for begin in answers:
        limit = min((start for start in starts if start >= begin), default=float("inf"))
        stop = next((end for token, (start, end) in tokens if token in ends and begin <= start < limit), begin)
        found.append((begin, stop))
    return found
