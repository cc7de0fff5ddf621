"""SDFT: the model rewrites the answers in its own words before it is trained on them."""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from tqdm import tqdm

from lfu.data.templates import ALPACA, ALPACA_WITH_INPUT
from lfu.evaluation import batching
from lfu.evaluation.pieces import encode, longest_input
from lfu.evaluation.record import weights_hash
from lfu.methods.agreement import agreed
from lfu.methods.method import Method, knob
from lfu.methods.rows import Message, Row, messages_of, shape_of, template_arguments
from lfu.methods.run import Preparation
from lfu.methods.writing import Rewrite, Rewrites, end_tokens, kept, key_of, length_of, ready_to_write
from lfu.support.errors import UserError

PROMPT_VERSION = 1  # raise it when what the model is asked changes: older rewrites are then left alone
# The wording is the paper's (Fig. 3), the headings those of the template of its authors' code.
PREAMBLE = (
    "Below are an instruction that describes a task along with a reference answer. "
    "Using the reference answer as a guide, write your own response."
)
INSTRUCTION, REFERENCE, RESPONSE = "### Instruction:\n", "### Reference Answer:\n", "### Response:\n"
_HEADING = re.compile(r"^### (?:Instruction|Input|Reference Answer|Response):", re.MULTILINE)
LINE_EVERY = 60.0  # seconds between two notes on the progress where there is no terminal

Ids = list[int]


class SDFT(Method):
    """`l = - (1/N) sum_t log p(y'_t | x, y'_<t)`, where y' is the model's rewrite of y if the two agree, else y itself.

    The model as it is before fine-tuning is asked for an answer of its own, given question and reference answer (Eq.
    3); that is used if its final answer is still the same (Eq. 4; see `lfu.methods.agreement.agreed`). Of a
    conversation the last answer alone is rewritten. Generation is greedy. What the model writes behind one of the
    prompt's own headings is cut away, as base models go on with a next exercise.

    Rewrites are kept on disk as soon as their batch is done: a run that was killed goes on where it was, and a second
    run generates nothing. `trl.experimental.sdft` is another method of the same name (arXiv 2601.19897).
    """

    name = "sdft"
    summary = "the model rewrites the answers before it is trained on them"
    source = "Yang et al., ACL 2024, arXiv 2402.13669"
    protects = "the model's own way of answering, and what it was aligned to"
    once = "before training, one answer generated for each row"
    places = ("answers",)

    max_new_tokens: int = knob(256, "longest rewrite, in tokens; one that is cut off is not used (ours)", low=1)
    batch_size: int = knob(8, "rows rewritten at a time (ours)", low=1)
    cache: str = knob("", "folder that keeps the rewrites (default: sdft in lfu's cache folder)", output=True)

    def configure(self, args: Any) -> None:
        if args.chat_template_path:
            raise ValueError("sdft can't wait for chat_template_path: set the tokenizer's chat_template instead")

    def rows(self, rows: Dataset, run: Preparation) -> Dataset:
        if shape_of(rows, self.name, run.args.dataset_text_field) == "text":
            raise UserError(
                "sdft rewrites answers, and training rows of one text don't say where theirs begins: "
                "give prompt and completion, or messages"
            )
        if any(p.is_meta or hasattr(p, "ds_id") for p in run.model.parameters()):
            raise ValueError(
                "sdft generates with the whole model, which ZeRO-3 or FSDP has split or not loaded yet: run it once in "
                "one process with max_steps=1, and the rewrites will be found on disk"
            )
        room = longest_input(run.model, most=2**30) - self.max_new_tokens
        tasks = [task_of(row, run.text_tokenizer, room) for row in rows]
        rewrites = self._rewrites([task.ids for task in tasks if task.ids], run)
        done, left, words = [], Counter[str](), Counter[str]()
        for row, task in zip(rows, tasks):
            answer, reason = None, task.left
            if task.ids:
                text, ended = _own_answer(rewrites[tuple(task.ids)])
                answer, reason = agreed(text, task.reference, ended)
            if answer is None:
                left[reason] += 1
                done.append(row)
            else:
                words.update(old=len(task.reference.split()), new=len(answer.split()))
                done.append(_with_answer(row, answer))
        run.say(_summary(len(rows), left, words))
        return Dataset.from_list(done, features=rows.features)

    def _rewrites(self, prompts: Sequence[Ids], run: Preparation) -> dict[tuple[int, ...], Rewrite]:
        """Each prompt's rewrite, from disk or made now; kept batch by batch."""
        ends, model = end_tokens(run), weights_hash(run.model)
        keys = {tuple(ids): key_of(PROMPT_VERSION, self.max_new_tokens, ends, ids) for ids in prompts}
        with kept(self, self.name, model, run.say) as folder:
            known = Rewrites(folder / f"{model}.jsonl")
            missing = [list(ids) for ids, key in keys.items() if key not in known.found]
            if missing:
                run.say(f"sdft: the model rewrites {len(missing):,} answers, kept in {known.path}")
                pause = 0.1 if sys.stderr.isatty() else LINE_EVERY
                bar = tqdm(total=len(missing), desc="rewriting answers", mininterval=pause, leave=False)
                with ready_to_write(run), bar:
                    for batch in batching.batches([len(ids) for ids in missing], self.batch_size):
                        asked = [missing[i] for i in batch]
                        written = generate(run.model, run.text_tokenizer, asked, ends, self.max_new_tokens)
                        known.add({keys[tuple(ids)]: text for ids, text in zip(asked, written)})
                        bar.update(len(batch))
            return {ids: known.found[key] for ids, key in keys.items()}


def _summary(rows: int, left: Counter[str], words: Counter[str]) -> str:
    """One line; a weak model keeps the final answer and drops the way to it, which the lengths show."""
    line = f"sdft: {rows - left.total():,} of {rows:,} answers rewritten"
    if words["old"]:
        line += f" ({words['new'] / words['old']:.2f} times as long in words)"
    if left:
        why = ", ".join(f"{count:,} {reason}" for reason, count in left.most_common())
        line += f"; {left.total():,} kept as they were ({why})"
    return line


class Task(NamedTuple):
    """What the model is asked about one row."""

    ids: Ids  # the prompt's tokens; none where the row is left alone
    reference: str = ""  # the answer in the data
    left: str = ""  # why the row is left alone


def task_of(row: Row, tokenizer: Any, longest: float = float("inf")) -> Task:
    """The prompt for the rewrite of a row in one of TRL's shapes; it may have up to `longest` tokens."""
    turns = messages_of(row)
    if turns is None:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    question, answer = turns[-2:] if len(turns) > 1 else ({}, turns[-1])
    if answer["role"] != "assistant" or not _is_text(answer) or answer.get("tool_calls"):
        return Task([], left="without a text answer at the end")
    if answer.get("weight") == 0:
        return Task([], left="with a last answer that is not learned")
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


def _is_text(message: Message) -> bool:
    return isinstance(message.get("content"), str) and bool(message["content"].strip())


def generate(model: Any, tokenizer: Any, prompts: Sequence[Ids], ends: Ids, max_new_tokens: int) -> list[Rewrite]:
    """Greedy continuations of the prompts, up to one of the tokens `ends`, without special tokens."""
    how = {"use_cache": True, "repetition_penalty": 1.0}  # a model's own would punish it for keeping to the reference
    out = batching.generate(model, tokenizer, prompts, max_new_tokens, ends, **how)
    lengths = [length_of(tokens, ends) for tokens in out]
    texts = [tokenizer.decode(tokens[:end], skip_special_tokens=True) for tokens, end in zip(out, lengths)]
    return [Rewrite(text, end < len(tokens)) for text, end, tokens in zip(texts, lengths, out)]


def _own_answer(rewrite: Rewrite) -> tuple[str, bool]:
    """The answer alone, without the prompt's headings and what follows a next one; and whether it came to its end."""
    text, *next_exercise = _HEADING.split(rewrite.text.strip().removeprefix(RESPONSE.strip()))
    return text.strip(), rewrite.ended or bool(next_exercise)


def _with_answer(row: Row, answer: str) -> Row:
    """The row with another last answer; white space around the old one stays."""
    column = "messages" if "messages" in row else "completion"
    plain = isinstance(row[column], str)
    old = row[column] if plain else row[column][-1]["content"]
    start = len(old) - len(old.lstrip())
    answer = old[:start] + answer + old[len(old.rstrip()) :]
    return row | {column: answer if plain else [*row[column][:-1], {**row[column][-1], "content": answer}]}
