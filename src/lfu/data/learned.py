"""What is learned of a row: TRL writes and tokenises it, and here is checked that what it wrote is what the row says.

One rule for all shapes: the loss is on the answers, which are the completion of a prompt and every assistant turn of a
conversation, each with the token that ends it; of a plain text it is on all of it. `assistant_only_loss=False` puts the
loss on every turn of a conversation, which is TRL's default.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from trl import SFTTrainer
from trl.data_utils import maybe_apply_chat_template

from lfu.data.checking import IGNORED, Checking
from lfu.data.columns import is_exact
from lfu.data.lengths import about_cuts
from lfu.data.show import rule
from lfu.data.templates import around, to_training_rows
from lfu.data.turns import MARK, NOT_LEARNED, Message, is_learned, said, shared_start, special_ids
from lfu.support.errors import UserError, one_line
from lfu.support.versions import mend_trl

try:
    from trl import chat_template_utils
except ImportError:  # TRL 0.24 has no templates of its own for training
    chat_template_utils = None
mend_trl()
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHUNK = 1000  # rows that are held as Python lists at a time
Row = Mapping[str, Any]


def tokenised(
    rows: Dataset, tokenizer: Any, args: Any, tell: Callable[[str], None] = lambda line: None, kind: str = ""
) -> Dataset:
    """The rows as token ids with their labels, not cut: what `SFTTrainer` then trains on as it is.

    Args:
        rows: in one of TRL's shapes, as `to_training_rows` makes them.
        tokenizer: the model's, with the chat template that is used.
        args: the `SFTConfig`. `assistant_only_loss` None or True: of `messages` the answers are learned, even if the
            chat template does not mark them; False: every turn.
        tell: called with one line about whatever the chat template changes or leaves out.
        kind: what rows these are, for messages: `"evaluation "`, say.

    Returns:
        `input_ids` and `labels`, int32 lists; -100 where nothing is learned.

    Raises:
        UserError: the chat template fails on a row, or leaves an answer out; with the number of the row.
    """
    writing = _Writing(rows, tokenizer, args, kind or "data ")
    checking = Checking(tokenizer, pairs=writing.trainer.completion_only_loss, kind=kind)
    chunks: list[pa.Table] = []
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for number, (row, ids, labels) in enumerate(writing, start=1):
        checking.check(row, ids, labels, number)
        found["input_ids"].append(ids)
        found["labels"].append(labels)
        if number % CHUNK == 0 or number == len(rows):
            chunks.append(pa.table({key: pa.array(lists, pa.list_(pa.int32())) for key, lists in found.items()}))
            found = {"input_ids": [], "labels": []}
    checking.report(tell)
    if writing.closing:
        end = tokenizer.decode(writing.closing)
        tell(f"note: the tokenizer ends texts with {end}, as training does: it is put there once")
    return Dataset(pa.concat_tables(chunks))


def is_tokenised(dataset: Any) -> bool:
    """Whether the rows are tokens already."""
    return "input_ids" in (getattr(dataset, "column_names", None) or ())


def whole_text(row: Row, tokenizer: Any) -> str:
    """A training row as the text that TRL makes of it, without an end-of-sequence token behind a plain text."""
    made = maybe_apply_chat_template(dict(row) | {"chat_template_kwargs": row.get("chat_template_kwargs") or {}},
                                     tokenizer, tools=row.get("tools"))  # fmt: skip
    return "".join(made[column] for column in ("prompt", "completion", "text") if column in made)


class _Writing:
    """The rows with the token ids and labels that `SFTTrainer._prepare_dataset` gives them, one after the other.

    TRL gets the rows as Python objects, since a `Dataset` would type what they hold.
    """

    def __init__(self, rows: Dataset, tokenizer: Any, args: Any, kind: str):
        self.rows, self.tokenizer, self.kind = rows, tokenizer, kind
        self.number = 0  # of the row that TRL is at
        columns = rows.column_names
        answers = "messages" in columns and args.assistant_only_loss is not False
        some = "messages" in columns and any(m.get("weight") == 0 for messages in rows["messages"] for m in messages)
        if some and not answers:
            raise UserError(
                "an answer has weight 0, which says that it is not learned, and --assistant_only_loss false has every "
                "turn learned: drop one of them"
            )
        if _is_plain(rows[0]) and not tokenizer.eos_token:
            raise UserError("the tokenizer has no end-of-sequence token to end texts with: name one with --eos_token")
        marked, template = _marked_template(tokenizer) if answers else (False, None)
        self.by_turns = answers and (some or not marked)  # a template's marks are round every answer
        self.args = copy.copy(args)
        self.args.max_length, self.args.shuffle_dataset = None, False
        if "text" not in columns and args.dataset_text_field in columns:  # TRL 0.24 ends no text of another name
            self.rows, self.args.dataset_text_field = rows.rename_column(args.dataset_text_field, "text"), "text"
        self.args.assistant_only_loss = marked and not some
        self.arguments_as_text = bool({"messages", "tools"} & {*columns}) and _wants_text(tokenizer, template)
        completion = "completion" in columns if args.completion_only_loss is None else args.completion_only_loss
        self.trainer: Any = SFTTrainer.__new__(SFTTrainer)  # no model is needed; this is all that is read of a trainer
        self.trainer._tokenizer, self.trainer._is_vlm = tokenizer, False
        self.trainer.chat_template, self.trainer.completion_only_loss = template, completion
        # tokens behind every plain text that repeat the end which TRL puts there
        self.closing = [tokenizer.eos_token_id] if _is_plain(rows[0]) and _ends_texts(tokenizer) else []

    def __iter__(self) -> Iterator[tuple[Row, list[int], list[int]]]:
        stream = IterableDataset(ExamplesIterable(self._rows, {}))
        try:
            for row in self.trainer._prepare_dataset(stream, self.tokenizer, self.args, False, None, "train"):
                ids = list(row["input_ids"])
                labels = self._answers(row, ids) if self.by_turns else self._labels(row, ids)
                length = len(ids) - len(self.closing)
                yield row, ids[:length], labels[:length]
        except UserError:
            raise
        except Exception as error:  # whatever a template or a tokenizer trips over
            row = self.rows[max(self.number - 1, 0)]
            writer = "tokenizer" if _is_plain(row) else "chat template"
            raise UserError(
                f"{self.kind}row {self.number}: the {writer} can't write it ({type(error).__name__}: "
                f"{one_line(error)[:200]}); the row: {one_line(row)[:200]}"
            ) from error

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(self.rows, start=1):
            self.number = number
            if "chat_template_kwargs" in row:
                row["chat_template_kwargs"] = row["chat_template_kwargs"] or {}
            if self.arguments_as_text:
                row |= {key: _with_text(row[key]) for key in ("messages", "prompt", "completion") if key in row}
            yield number, row

    def _labels(self, row: Row, ids: list[int]) -> list[int]:
        """TRL's; where it leaves their making to its collator, as it does before 1.7, by its masks."""
        if (row.get("answers") or (self.closing and "prompt" in row)) and self.trainer.completion_only_loss:
            return self._answers_of_text(row, ids)
        if "labels" in row:
            labels = list(row["labels"])
        else:
            wanted = ["assistant_masks", *(["completion_mask"] if self.trainer.completion_only_loss else [])]
            masks = [row[name] for name in wanted if name in row]
            labels = [token if all(bits) else IGNORED for token, *bits in zip(ids, *masks)]
        if isinstance(row.get("prompt"), list) and self.trainer.completion_only_loss:
            self._take_off_the_prompt(row, ids, labels)
        return labels

    def _take_off_the_prompt(self, row: Row, ids: list[int], labels: list[int]) -> None:
        """What TRL has learned of a prompt that the template writes otherwise once the completion follows."""
        start = next((place for place, label in enumerate(labels) if label != IGNORED), len(ids))
        end = row["prompt"][-1].get("content", "").strip()[-20:]  # a quick look first: mostly it is where it should be
        if end not in self.tokenizer.decode(ids[max(0, start - 64) : start], clean_up_tokenization_spaces=False):
            start = self._start_of(row, row["prompt"] + row["completion"], len(row["prompt"]), ids)
            labels[:start] = [IGNORED] * start

    def _answers_of_text(self, row: Row, ids: list[int]) -> list[int]:
        """Labels of a conversation that is written as a text: of its completion, and of the answers in its prompt."""
        labels, prompt = [IGNORED] * len(ids), row["prompt"]
        upto = lambda place: shared_start(self.tokenizer(prompt[:place])["input_ids"], ids)
        spans = [(upto(start), upto(end)) for start, end in row.get("answers") or ()]
        for start, end in [*spans, (upto(len(prompt)), len(ids))]:
            labels[start:end] = ids[start:end]
        return labels

    def _answers(self, row: Row, ids: list[int]) -> list[int]:
        """Labels of the assistant's turns, for a template that does not mark them.

        A turn begins where the conversation before it, with the generation prompt, ends. It ends where the conversation
        up to it does. Where a template writes a turn otherwise once another follows (without its reasoning, or tools in
        front of the last question alone), it begins with the first token that changes with it, if that is later, and
        ends behind the last one and the special tokens that follow there.
        """
        messages, labels = row["messages"], [IGNORED] * len(ids)
        for index, message in enumerate(messages):
            if not is_learned(message):
                continue
            start, end = self._start_of(row, messages, index, ids), len(ids)
            if index + 1 < len(messages):
                upto = self._write(row, messages[: index + 1])
                end = shared_start(upto, ids)
                if end < len(upto):
                    end = max(end, self._end_of(row, messages, index, ids))
            labels[start:end] = ids[start:end]
        return labels

    def _start_of(self, row: Row, messages: list[Message], index: int, ids: list[int]) -> int:
        before, start = messages[:index], 0
        if before:
            asked = self._write(row, before, add_generation_prompt=True)
            start = shared_start(asked, ids)
            if start == len(asked) or start >= len(self._write(row, before)):  # else it writes otherwise what is before
                return start
        return max(start, min(shared_start(other, ids) for other in self._with_others(row, messages, index)))

    def _end_of(self, row: Row, messages: list[Message], index: int, ids: list[int]) -> int:
        end = len(ids) - min(shared_start(other[::-1], ids[::-1]) for other in self._with_others(row, messages, index))
        ending = special_ids(self.tokenizer) - {self.tokenizer.bos_token_id}
        while end < len(ids) and ids[end] in ending:
            end += 1
        return end

    def _with_others(self, row: Row, messages: list[Message], index: int) -> Iterator[list[int]]:
        """The conversation with another answer in place of that one, in two ways that begin and end differently."""
        for answer in (MARK, MARK[::-1]):
            yield self._write(row, [*messages[:index], said("assistant", answer), *messages[index + 1 :]])

    def _write(self, row: Row, messages: list[Message], **more: Any) -> list[int]:
        more |= {"tools": row.get("tools"), "chat_template": self.trainer.chat_template}
        options = (row.get("chat_template_kwargs") or {}) | more
        return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def _is_plain(row: Row) -> bool:
    """Whether a row is of texts, and not a conversation."""
    return isinstance(next(iter(row.values())), str)


def _ends_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the end-of-sequence token behind every text, as TRL does."""
    return around(tokenizer)[1] == [tokenizer.eos_token_id]


def _says_more(dataset: Dataset, names: Sequence[str]) -> bool:
    """Whether typed conversations say what TRL does not see: tools, whose absent keys Arrow fills in, weights, and who
    speaks in ShareGPT's words."""
    kinds = [
        str(dataset.features[name]) for name in ("messages", "prompt", "completion", "conversations") if name in names
    ]
    if any(is_exact(dataset, name) for name in names) or not re.search("'(role|from)'", "".join(kinds)):
        return False
    more = re.compile(f"'({'|'.join(('from', 'tool_calls', 'function_call', *NOT_LEARNED))})'")
    return "tools" in names or bool(more.search("".join(kinds)))


def _marked_template(tokenizer: Any) -> tuple[bool, str | None]:
    """Whether TRL can tell the answers by `{% generation %}` marks, and in which template (None: the tokenizer's)."""
    template, own = None, tokenizer.chat_template
    trained = getattr(chat_template_utils, "is_chat_template_stop_token_trained", None)  # younger than the other
    if not getattr(tokenizer, "is_fast", False) or trained is None:
        return False, None
    if not MARKED.search(own["default"] if isinstance(own, dict) else own):
        try:
            template = chat_template_utils.get_training_chat_template(tokenizer)
        except Exception:
            return False, None
    return (True, template) if trained(tokenizer, chat_template=template) else (False, None)


def _wants_text(tokenizer: Any, template: str | None) -> bool:
    """Whether the chat template takes the arguments of a tool call as JSON text alone (DeepSeek-V3's does)."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    turns = [said("user", "a"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
    except TypeError:
        return True
    except Exception:
        return False
    return False


def _with_text(messages: list[Message]) -> list[Message]:
    written = copy.deepcopy(messages)
    for call in (call for message in written for call in message.get("tool_calls") or []):
        if not isinstance(call["function"].get("arguments", ""), str):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return written


class LearnsWhatRowsSay(SFTTrainer):
    """`SFTTrainer` that takes the rows of `to_training_rows`, whose nested values a `Dataset` would alter in `map`.

    `tell` is called with one line about whatever is cut off, left out or learned in another way than the rows say.
    """

    tell: Callable[[str], None]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        prepare = super()._prepare_dataset
        if isinstance(dataset, Dataset):
            names = () if is_tokenised(dataset) else dataset.column_names
            if formatting_func is None and _says_more(dataset, names):
                dataset = to_training_rows(dataset, tokenizer=processing_class, tell=self.tell)
                names = dataset.column_names
            if "messages" in names and args.assistant_only_loss is False and formatting_func is None:
                self.tell(f"note: {rule(dataset[0], args)}")
            twice = bool(names) and {*names} <= {"prompt", "completion", "text"} and formatting_func is None
            twice = twice and _is_plain(dataset[0]) and _ends_texts(processing_class)
            if twice or any(is_exact(dataset, column) for column in names):
                kind = "" if dataset_name == "train" else "evaluation "
                dataset = tokenised(dataset, processing_class, args, self.tell, kind)
            if args.max_length is not None:  # tokens first, to see what will be cut
                uncut = copy.copy(args)
                uncut.max_length, uncut.shuffle_dataset = None, False
                dataset = prepare(dataset, processing_class, uncut, False, formatting_func, dataset_name)
                formatting_func, what = None, "rows" if dataset_name == "train" else "evaluation rows"
                for line in about_cuts(dataset, what, args, packed=packing):
                    self.tell(f"warning: {line}")
        return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
