"""Whether a chat template writes what the rows say: a lost answer is refused, anything else that is lost is told."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lfu.data.turns import Message, is_learned, special_ids
from lfu.support.errors import UserError, one_line
from lfu.support.words import counted

Row = Mapping[str, Any]
IGNORED = -100
CHECKED = ("role", "content", "tool_calls", "weight")  # keys of a message that are checked or acted on


class Checking:
    """Compares what the chat template wrote with what the rows say."""

    def __init__(self, tokenizer: Any, *, pairs: bool):
        self.tokenizer, self.pairs = tokenizer, pairs
        self.odd: dict[str, tuple[int, int]] = {}  # what is told -> rows, first of them
        template = tokenizer.chat_template
        self.template = " ".join(template.values()) if isinstance(template, dict) else str(template)
        names = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
        self.special = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def check(self, row: Row, ids: list[int], labels: list[int], number: int) -> None:
        """Raises UserError for a row whose answers are not learned; notes what else the template leaves out."""
        if not isinstance(next(iter(row.values())), list):
            self._check_text(row, ids, labels, number)
            return
        learned, place = self._learned(ids, labels), 0
        last = row["messages"] if "messages" in row else row["completion"]
        for message in filter(is_learned, last):
            place = self._answer(message, learned, place, number)
        whole = self._decode(ids)
        odd: set[str] = set()
        for message in [*(row.get("prompt") or []), *last]:
            given = [key for key, value in message.items() if value not in (None, "", [], {}) and key not in CHECKED]
            unknown = [key for key in given if key not in self.template]
            word = lambda key: "note" if key in ("name", "id", "tool_call_id") else "warning"  # how much it matters
            odd |= {f"{word(key)}: the chat template does not use the key {key!r} of messages" for key in unknown}
            text = after_thinking(message.get("content", "")).strip()
            if message["role"] != "assistant" and text and self._find(text, whole, 0) < 0:
                odd.add(f"warning: the chat template leaves out what the {message['role']} says")
            if special := self.special.search(message.get("content", "")):
                odd.add(f"warning: the tokenizer reads {special[0]} in a text as that special token")
        roles = {message["role"] for message in row.get("completion") or []} - {"assistant"} if self.pairs else ()
        odd |= {f"warning: the completion also teaches what the {role} says" for role in roles}
        names = [str((tool.get("function") or tool).get("name") or "") for tool in row.get("tools") or []]
        if any(name not in whole for name in names):
            odd.add("warning: the chat template leaves out the tools")
        for each in odd:
            self._count(each, number)

    def _check_text(self, row: Row, ids: list[int], labels: list[int], number: int) -> None:
        if self.pairs and "completion" in row and not row.get("answers"):
            start = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
            if _plain(self._decode(ids[start : start + 8]))[:4] != _plain(row["completion"])[:4]:
                odd = "a token goes over the border of prompt and answer (end prompts with a line break)"
                self._count(f"warning: {odd}", number)

    def _count(self, what: str, number: int) -> None:
        rows, first = self.odd.get(what, (0, number))
        self.odd[what] = (rows + 1, first)

    def report(self, tell: Callable[[str], None]) -> None:
        for what, (rows, first) in self.odd.items():
            tell(f"{what} in {counted(rows, 'row')} (first: row {first})")

    def _learned(self, ids: list[int], labels: list[int]) -> str:
        """The learned tokens as text, a break where tokens between them are not learned."""
        runs: list[list[int]] = [[]]
        for token, label in zip(ids, labels):
            if label != IGNORED:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        return "\0".join(self._decode(run) for run in runs if run)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

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
            if content.strip() == least:
                word = "warning" if content[:1].isspace() else "note"  # code loses its indentation
                self._count(f"{word}: the chat template takes the white space around answers off", number)
        for call in message.get("tool_calls") or []:
            function, arguments = call["function"], call["function"].get("arguments")
            for needle in [str(function.get("name") or ""), *_leaves(arguments)]:
                end = self._find(needle, learned, place)
                if end < 0 or (isinstance(arguments, str) and arguments not in learned):  # quoted, so encoded twice
                    self._refuse(number, f"the tool call {one_line(json.dumps(function, ensure_ascii=False), 60)!r}")
                ends.append(end)
        return max(ends)

    def _refuse(self, number: int, what: str) -> None:
        raise UserError(
            f"data row {number}: the chat template leaves out, or changes, {what}: take a model whose template writes "
            "it, give another with --chat_template_path, or leave such rows out"
        )

    def _find(self, needle: str, text: str, start: int) -> int:
        """Where the needle ends in the text, or -1; as the tokenizer reads it, if that changes texts."""
        place = text.find(needle, start)
        if place >= 0:
            return place + len(needle)
        if needle != needle.strip():
            return -1
        back = self._decode(self.tokenizer(needle, add_special_tokens=False, verbose=False)["input_ids"])
        return start if any(_plain(one) in _plain(text) for one in (needle, back)) else -1


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
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _plain(text: str) -> str:
    """A text without what tokenizers and JSON change: white space, case, compatibility forms, escapes."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    text = re.sub(r"\\[nrt]", "", text).replace("\\", "")
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
