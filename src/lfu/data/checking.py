"""Whether a chat template writes what the rows say: a lost answer is refused, anything else that is lost is told."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

from lfu.data.turns import Message, is_learned, special_ids, special_pattern
from lfu.support.errors import UserError, one_line
from lfu.support.words import counted

Row = Mapping[str, Any]
IGNORED = -100
CHECKED = ("role", "content", "tool_calls", "weight")  # keys of a message that are checked or acted on
REASONING = ("reasoning_content", "reasoning", "thinking")  # those that hold what an answer was thought up with
NAMES = ("name", "id", "tool_call_id")  # of little meaning where a template leaves them out


class Checking:
    """Compares what the chat template wrote with what the rows say."""

    def __init__(self, tokenizer: Any, *, pairs: bool, kind: str = ""):
        self.tokenizer, self.pairs, self.kind = tokenizer, pairs, kind
        self.odd: dict[str, tuple[int, int]] = {}  # what is told -> rows, first of them
        template = tokenizer.chat_template
        self.template = " ".join(template.values()) if isinstance(template, dict) else str(template)
        self.special = special_pattern(tokenizer)
        self.ends = special_ids(tokenizer) - ({tokenizer.bos_token_id} - {tokenizer.eos_token_id})

    def check(self, row: Row, ids: list[int], labels: list[int], number: int) -> None:
        """Raises UserError for a row whose answers are not learned; notes what else the template leaves out."""
        if not isinstance(next(iter(row.values())), list):
            self._check_text(row, ids, labels, number)
            return
        own, prompt = row["messages"] if "messages" in row else row["completion"], row.get("prompt") or []
        spans = _spans(labels)
        learned, place = "\0".join(self._piece(ids, *span) for span in spans), 0  # a break between two spans
        for message in filter(is_learned, own):
            place = self._answer(message, learned, place, number)
        whole = self._decode(ids)
        odd = {line for message in [*prompt, *own] for line in self._odd(message, whole)}
        shown = [*prompt, *(message for message in own if not is_learned(message))]
        odd |= {f"warning: the chat template leaves out {what}" for what in self._lost(shown, [*prompt, *own], whole)}
        odd |= set(self._beside(row, whole))
        roles = {message["role"] for message in row.get("completion") or []} - {"assistant"} if self.pairs else ()
        odd |= {f"warning: the completion also teaches what the {role} says" for role in roles}
        if is_learned(own[-1]) and spans and not self.ends & {*ids[slice(*spans[-1])]}:
            odd.add("warning: the chat template puts no special token behind an answer (one teaches when to stop)")
        for each in odd:
            self._count(each, number)

    def _odd(self, message: Message, whole: str) -> Iterator[str]:
        """What is lost of a message beside its text, and what is read in it."""
        for key, value in message.items():
            if value in (None, "", [], {}) or key in (*CHECKED, *REASONING):
                continue
            if not (self._mentions(key) or (isinstance(value, str) and value in whole)):
                word = "note" if key in NAMES else "warning"
                yield f"{word}: the chat template does not use the key {key!r} of messages"
        content = message.get("content", "")
        inner = "" if content.strip() in whole else content.rpartition("</think>")[0].replace("<think>", "")
        thought = [inner, *map(message.get, REASONING)]
        if not all(self._find(text.strip(), whole, 0) >= 0 for text in thought if isinstance(text, str)):
            yield "warning: the chat template leaves out the reasoning of answers"
        if special := self.special.search(content):
            yield f"warning: the tokenizer reads {special[0]} in a text as that special token"

    def _lost(self, shown: list[Message], messages: list[Message], whole: str) -> Iterator[str]:
        """What is lost of the messages that are shown and not learned."""
        said = [after_thinking(message.get("content", "")) for message in messages]
        for message in shown:
            text = after_thinking(message.get("content", "")).strip()
            if text and not self._is_said(text, said, whole):
                yield f"what the {message['role']} says"
            calls = message.get("tool_calls") or []
            if calls and ("tool_calls" not in self.template or any(self._call(call, whole, 0) < 0 for call in calls)):
                yield f"a tool call of the {message['role']}"

    def _is_said(self, text: str, said: list[str], whole: str) -> bool:
        """Whether a text is in the whole as often as in all that is said, since another turn may have it, too."""
        if whole.count(text) >= sum(each.count(text) for each in said):
            return True
        whole, said = _plain(whole), [*map(_plain, said)]
        return any(whole.count(one) >= max(1, sum(each.count(one) for each in said)) for one in self._spellings(text))

    def _beside(self, row: Row, whole: str) -> Iterator[str]:
        names = [str((tool.get("function") or tool).get("name") or "") for tool in row.get("tools") or []]
        if names and ("tools" not in self.template or any(name not in whole for name in names)):
            yield "warning: the chat template leaves out the tools"
        for key in row.get("chat_template_kwargs") or {}:
            if not re.search(rf"\b{re.escape(key)}\b", self.template):
                yield f"warning: the chat template has no option {key!r} (chat_template_kwargs)"

    def _mentions(self, key: str) -> bool:
        """Whether the template has the key of a message: `message.key`, or `message['key']`."""
        return bool(re.search(rf"""[.'"]{re.escape(key)}\b""", self.template))

    def _check_text(self, row: Row, ids: list[int], labels: list[int], number: int) -> None:
        if self.pairs and "completion" in row and not row.get("answers"):
            start = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
            begins, wanted = self._piece(ids, start, len(ids)), row["completion"]
            other = _plain(begins[:40])[:4] != _plain(wanted)[:4]
            if other or _indent(begins) != _indent(wanted):
                odd = "a token goes over the border of prompt and answer (end prompts with a line break)"
                self._count(f"{'warning' if other else 'note'}: {odd}", number)
        last, eos, whole = self._decode(ids[-8:-1]), self.tokenizer.eos_token, self._decode(ids)
        if last != last.rstrip() and last.rstrip().endswith(eos):
            end = f"{eos} and white space, and training puts {eos} behind it again (take the white space off)"
            self._count(f"warning: the text ends with {end}", number)
        texts = [row["prompt"], row["completion"]] if "completion" in row else [next(iter(row.values()))]
        if any(text.removesuffix(eos).strip() not in whole for text in texts):
            self._count("warning: the tokenizer changes letters or white space of texts", number)

    def _count(self, what: str, number: int) -> None:
        rows, first = self.odd.get(what, (0, number))
        self.odd[what] = (rows + 1, first)

    def report(self, tell: Callable[[str], None]) -> None:
        for what, (rows, first) in self.odd.items():
            tell(f"{what} in {counted(rows, f'{self.kind}row')} (first: row {first})")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _piece(self, ids: list[int], start: int, end: int) -> str:
        """The text of some tokens; alone they may lose their first space."""
        before = slice(max(0, start - 1), start)
        return self._decode(ids[before.start : end]).removeprefix(self._decode(ids[before]))

    def _answer(self, message: Message, learned: str, place: int, number: int) -> int:
        """Where the answer ends in the learned text."""
        content, ends = message.get("content", ""), [place]
        if content.strip() and (end := self._find(content, learned, place)) >= 0:
            ends.append(end)
        elif content.strip():
            least = after_thinking(content).strip()
            ends.append(self._find(least, learned, place))
            if ends[-1] < 0:
                self._refuse(number, f"the answer {one_line(content, 60)!r}")
            if content.strip() == least and content.strip() in learned:
                word = "warning" if content[:1].isspace() else "note"  # code loses its indentation
                self._count(f"{word}: the chat template takes the white space around answers off", number)
        if content.strip() not in learned and after_thinking(content).strip() not in learned:
            self._count("warning: the chat template or the tokenizer changes letters or white space of answers", number)
        for call in message.get("tool_calls") or []:
            ends.append(self._call(call, learned, place))
            if ends[-1] < 0:
                function = json.dumps(call["function"], ensure_ascii=False)
                self._refuse(number, f"the tool call {one_line(function, 60)!r}")
        return max(ends)

    def _call(self, call: Mapping[str, Any], text: str, place: int) -> int:
        """Where the tool call ends in the text; -1 where it is not whole."""
        name, arguments = str(call["function"].get("name") or ""), call["function"].get("arguments")
        ends = [self._find(needle, text, place) for needle in [name, *_leaves(arguments)]]
        quoted = isinstance(arguments, str) and arguments not in text  # so encoded twice
        return -1 if quoted or min(ends) < 0 else max(ends)

    def _refuse(self, number: int, what: str) -> None:
        raise UserError(
            f"{self.kind or 'data '}row {number}: the chat template leaves out, or changes, {what}: take a model whose "
            "template writes it, give another with --chat_template_path, or leave such rows out"
        )

    def _find(self, needle: str, text: str, start: int) -> int:
        """Where the needle ends in the text, or -1; as the tokenizer reads it, if that changes texts."""
        place = text.find(needle, start)
        if place >= 0:
            return place + len(needle)
        if needle != needle.strip():
            return -1
        return start if any(one in _plain(text) for one in self._spellings(needle)) else -1

    def _spellings(self, text: str) -> tuple[str, str]:
        """A text without what tokenizers and JSON change, and as the tokenizer reads it."""
        back = self._decode(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return _plain(text), _plain(back)


def _spans(labels: list[int]) -> list[tuple[int, int]]:
    """Where what is learned begins and ends."""
    spans, place = [], 0
    for learned, run in groupby(label != IGNORED for label in labels):
        place, start = place + len(list(run)), place
        spans += [(start, place)] * learned
    return spans


def after_thinking(content: str) -> str:
    """An answer without its reasoning, which templates leave out of earlier turns."""
    return content.rpartition("</think>")[2]


def _leaves(value: Any) -> Iterator[str]:
    """The texts that a tool call's arguments must show: names and values, each in some spelling."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value.strip()  # JSON writes a line break at its end as two letters
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _indent(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _plain(text: str) -> str:
    """A text without what tokenizers and JSON change: white space, case, compatibility forms, escapes."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    text = re.sub(r"\\[nrt]", "", text).replace("\\", "")
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
