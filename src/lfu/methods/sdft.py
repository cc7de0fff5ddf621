"""SDFT: the model rewrites the answers in its own words before it is trained on them."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset

from lfu.data.templates import ALPACA, ALPACA_WITH_INPUT
from lfu.evaluation.batching import batches, encode, evaluating, greedy
from lfu.evaluation.record import weights_hash
from lfu.methods.agreement import agreed
from lfu.methods.method import Method, Preparation, knob
from lfu.methods.rewrites import Rewrite, key_of, opened
from lfu.methods.rows import end_tokens, shape_of, template_arguments
from lfu.model.embedded import cache_folder
from lfu.support.errors import UserError

PROMPT_VERSION = 1  # raise it when what the model is asked changes: older rewrites are then left alone
# The wording is the paper's (Fig. 3), the headings those of the template of its authors' code.
PREAMBLE = (
    "Below are an instruction that describes a task along with a reference answer. "
    "Using the reference answer as a guide, write your own response."
)
INSTRUCTION, REFERENCE, RESPONSE = "### Instruction:\n", "### Reference Answer:\n", "### Response:\n"
_HEADING = re.compile(r"^### (?:Instruction|Input|Reference Answer|Response):", re.MULTILINE)
LINE_EVERY = 60.0  # seconds between two lines of progress where there is no terminal

Ids = list[int]
Keep = Callable[[list[Ids], list[Rewrite]], None]


@dataclass
class SDFT(Method):
    """`l = - (1/N) sum_t log p(y'_t | x, y'_<t)`, where y' is the model's rewrite of y if the two agree, else y itself.

    The seed model, the model as it is before fine-tuning, is asked for an answer of its own given question and
    reference answer (Eq. 3), and used if its final answer is still the same (Eq. 4; `lfu.methods.agreement.agreed` says
    what that means). So the training answers come from the model's own distribution, and training moves it less. Of a
    conversation the last answer alone is rewritten. Generation is greedy.

    With a chat template the model is asked in a user turn, system message and earlier turns in front of it as they are;
    without one in a plain text of Alpaca's form. What it writes behind one of the prompt's own headings is cut away, as
    base models go on with a next exercise.

    Rewrites are kept on disk as soon as their batch is done: a run that was killed goes on where it was, and a second
    run generates nothing. What a rewrite depends on is its key: the model's weights, the prompt (and so the row), and
    `max_new_tokens`. `batch_size` changes it by rounding at most.

    `trl.experimental.sdft` is another method of the same name: on-policy distillation from a teacher that sees the
    answer (Shenfeld et al. 2026, arXiv 2601.19897).
    """

    name: ClassVar[str] = "sdft"
    summary: ClassVar[str] = "the model rewrites the answers before it is trained on them"
    source: ClassVar[str] = "Yang et al., ACL 2024, arXiv 2402.13669"
    protects: ClassVar[str] = "the model's own way of answering, and what it was aligned to"
    once: ClassVar[str] = "before training, one answer generated for each row"
    places: ClassVar[tuple[str, ...]] = ("answers",)

    max_new_tokens: int = knob(256, "longest rewrite, in tokens; one that is cut off is not used", low=1)
    batch_size: int = knob(8, "rows rewritten at a time", low=1)
    cache: str = knob("", "folder that keeps the rewrites (default: sdft in lfu's cache folder)", output=True)

    def configure(self, args: Any) -> None:
        if args.chat_template_path:
            raise ValueError(
                "method='sdft' rewrites the answers before chat_template_path is read: set the tokenizer's "
                "chat_template instead"
            )

    def rows(self, rows: Dataset, run: Preparation) -> Dataset:
        if shape_of(rows, self.name, run.args.dataset_text_field) == "text":
            raise UserError(
                "sdft rewrites answers, and training rows of one text don't say where theirs begins: "
                "give prompt and completion, or messages"
            )
        _refuse_split(run.model)
        tokenizer = getattr(run.tokenizer, "tokenizer", run.tokenizer)  # a processor holds one
        longest = _positions(run.model) - self.max_new_tokens
        tasks = [task_of(row, tokenizer, longest) for row in rows]
        rewrites = self._rewrites([task.ids for task in tasks if task.ids], run, tokenizer)
        done, kept, words = [], Counter[str](), Counter[str]()
        for row, task in zip(rows, tasks):
            answer, reason = None, task.left
            if task.ids:
                text, ended = _own_answer(rewrites[tuple(task.ids)])
                answer, reason = agreed(text, task.reference, ended)
            if answer is None:
                kept[reason] += 1
                done.append(row)
            else:
                words.update(old=len(task.reference.split()), new=len(answer.split()))
                done.append(_with_answer(row, answer))
        run.say(_summary(len(rows), kept, words))
        return Dataset.from_list(done, features=rows.features)

    def _folder(self) -> Path:
        return Path(self.cache).expanduser() if self.cache else cache_folder() / "sdft"

    def _rewrites(self, prompts: Sequence[Ids], run: Preparation, tokenizer: Any) -> dict[tuple[int, ...], Rewrite]:
        """Each prompt's rewrite, from disk or made now."""
        ends = end_tokens(run)
        keys = {tuple(ids): key_of(PROMPT_VERSION, self.max_new_tokens, ends, ids) for ids in prompts}
        with opened(self._folder(), weights_hash(run.model), run.say) as kept:
            missing = [list(ids) for ids, key in keys.items() if key not in kept.found]
            if missing:
                run.say(f"sdft: the model rewrites {len(missing):,} answers, kept in {kept.path}")
                keep = lambda asked, written: kept.add({keys[tuple(ids)]: text for ids, text in zip(asked, written)})
                self._write(missing, keep, run, tokenizer, ends)
            return {ids: kept.found[key] for ids, key in keys.items()}

    def _write(self, prompts: list[Ids], keep: Keep, run: Preparation, tokenizer: Any, ends: Ids) -> None:
        """Lets the model write, and hands each batch's prompts and rewrites to `keep` as they come."""
        with (
            evaluating(run.model),
            torch.no_grad(),
            on_training_device(run.args.device, run.model),
            _progress(len(prompts)) as tick,
        ):
            for batch in batches([len(ids) for ids in prompts], self.batch_size):
                asked = [prompts[i] for i in batch]
                keep(asked, generate(run.model, tokenizer, asked, ends, self.max_new_tokens))
                tick(len(batch))


def _summary(rows: int, kept: Counter[str], words: Counter[str]) -> str:
    """One line; a weak model keeps the final answer and drops the way to it, which the lengths show."""
    line = f"sdft: {rows - kept.total():,} of {rows:,} answers rewritten"
    if words["old"]:
        line += f" ({words['new'] / words['old']:.2f} times as long in words)"
    if kept:
        why = ", ".join(f"{count:,} {reason}" for reason, count in kept.most_common())
        line += f"; {kept.total():,} kept as they were ({why})"
    return line


# -- what the model is asked -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What the model is asked about one row.

    Attributes:
        ids: the prompt's tokens; none where the row is left alone.
        reference: the answer in the data.
        left: why the row is left alone.
    """

    ids: Ids
    reference: str = ""
    left: str = ""


def task_of(row: dict[str, Any], tokenizer: Any, longest: float = float("inf")) -> Task:
    """The prompt for one row's rewrite.

    Args:
        row: prompt and completion (texts or messages), or messages.
        tokenizer: with its chat template, if it has one.
        longest: the most tokens that a prompt may have.
    """
    turns = _turns(row)
    question, answer = turns[-2:] if len(turns) > 1 else ({}, turns[-1])
    if answer["role"] != "assistant" or not _is_text(answer) or answer.get("tool_calls"):
        return Task([], left="without a text answer at the end")
    if question.get("role") != "user" or not _is_text(question):
        return Task([], left="without a question before the answer")
    reference = answer["content"].removesuffix(tokenizer.eos_token or "").strip()
    text = rewriting_prompt(question["content"], reference)
    if tokenizer.chat_template:
        # Models that think first would spend the tokens on that; other templates don't look at the switch.
        options = {"enable_thinking": False, **template_arguments(row)}
        asked = [*turns[:-2], {**question, "content": text}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **options)
        ids = encode(tokenizer, text)
    else:
        ids = encode(tokenizer, f"{text}\n\n{RESPONSE}", special=True)
    return Task(ids, reference) if len(ids) <= longest else Task([], left="too long for the model")


def rewriting_prompt(question: str, reference: str) -> str:
    """The question, its reference answer, and what to do with them.

    A question in Alpaca's frame gives up its first paragraph and the last heading; its other headings stay.
    """
    head, found, body = question.partition(INSTRUCTION)
    if found and body.endswith(RESPONSE):
        own = "" if head.strip() in (ALPACA, ALPACA_WITH_INPUT) else f"{head.strip()}\n\n"
        body = body.removesuffix(RESPONSE)
    else:
        own, body = "", question
    return f"{own}{PREAMBLE}\n\n{INSTRUCTION}{body.strip()}\n\n{REFERENCE}{reference}"


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row as a conversation; two texts are a question and an answer."""
    if "messages" in row:
        return row["messages"]
    if isinstance(row["prompt"], list):
        return row["prompt"] + row["completion"]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def _is_text(message: dict[str, Any]) -> bool:
    return isinstance(message.get("content"), str) and bool(message["content"].strip())


def _with_answer(row: dict[str, Any], answer: str) -> dict[str, Any]:
    """The row with another last answer; white space around the old one stays."""
    column = "messages" if "messages" in row else "completion"
    old = row[column] if isinstance(row[column], str) else row[column][-1]["content"]
    start = len(old) - len(old.lstrip())
    answer = old[:start] + answer + old[len(old.rstrip()) :]
    if isinstance(row[column], str):
        return row | {column: answer}
    return row | {column: [*row[column][:-1], {**row[column][-1], "content": answer}]}


# -- what it answers -------------------------------------------------------------------------------------------------


def generate(model: Any, tokenizer: Any, prompts: Sequence[Ids], ends: Ids, max_new_tokens: int) -> list[Rewrite]:
    """Greedy continuations of the prompts, up to one of the tokens `ends`, without special tokens."""
    out = greedy(
        model, tokenizer, prompts, max_new_tokens, ends, use_cache=True,
        repetition_penalty=1.0,  # a model's own would punish it for keeping to the reference
    )  # fmt: skip
    rewrites = []
    for tokens in out.tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        rewrites.append(Rewrite(tokenizer.decode(tokens[:end], skip_special_tokens=True), end is not None))
    return rewrites


def _own_answer(rewrite: Rewrite) -> tuple[str, bool]:
    """The answer alone, without the prompt's headings and what follows a next one; and whether it came to its end."""
    text, *next_exercise = _HEADING.split(rewrite.text.strip().removeprefix(RESPONSE.strip()))
    return text.strip(), rewrite.ended or bool(next_exercise)


def _refuse_split(model: Any) -> None:
    if any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "method='sdft' lets the whole model generate, and ZeRO-3 or FSDP has split or not loaded it yet: run the "
            "rewriting once in one process with max_steps=1, and the rewrites will be found on disk"
        )


def _positions(model: Any) -> float:
    """How many tokens the model can take; infinity where its config doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


@contextmanager
def on_training_device(device: torch.device, model: Any) -> Iterator[None]:
    """The model on the device that training will use, and back: before the trainer is made it is mostly on the CPU."""
    home = next(model.parameters()).device
    moves = home.type == "cpu" and device.type != "cpu" and not getattr(model, "hf_device_map", None)
    if moves:
        model.to(device)
    try:
        yield
    finally:
        if moves:
            model.to(home)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line a minute, both on stderr; yields a function to call with the rows just done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, done, start = Console(stderr=True), 0, time.monotonic()
    said = start
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rewriting answers", total=total)

        def tick(rows: int) -> None:
            nonlocal done, said
            done += rows
            bar.update(task, completed=done)
            now = time.monotonic()
            if not console.is_terminal and now - said >= LINE_EVERY and done < total:
                said = now
                left = (now - start) / done * (total - done) / 60
                print(f"lfu: sdft: {done:,} of {total:,} answers, about {left:.0f} min left", file=sys.stderr)

        yield tick
