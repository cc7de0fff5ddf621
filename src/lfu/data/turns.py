"""Conversations in the ways that data sets write them, as the one that TRL and chat templates read.

Texts in turn (LIMA), `from` and `value` (ShareGPT), and `role` and `content` become messages of `role`, `content` and
whatever else the turn has. Nothing is stripped, and no text is changed. What can't be read is a ValueError that says
where; the caller knows the row.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lfu.data.exact_json import RepeatedKey, as_written, read_json

Message = dict[str, Any]

SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
MARK = "QzXjWvMark"  # stands where a text stands, to see what a template writes round it; no text has it
TEXT_PARTS = ("text", "input_text", "output_text")
NOT_LEARNED = ("weight", "train", "training")  # OpenAI's 0, and axolotl's false, on an answer that is not learned
NO_OPTIONS = (  # what `apply_chat_template` takes beside them: it would change what is learned, or how it is returned
    "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
WORDED = ("reasoning_content", "thinking", "name")  # further texts of a message
KINDS = {list: "a list", str: "a text", type(None): "null", bool: "true or false", int: "a number", float: "a number"}


class Blank(ValueError):
    """A row without the text that it should have: `what` is "text" or "answer"."""

    def __init__(self, column: str, what: str = "answer"):
        super().__init__(f"no {what} in column {column!r}")
        self.column, self.what = column, what


def said(role: str, text: str) -> Message:
    """A message."""
    return {"role": role, "content": text}


def text_of(value: Any, where: str) -> str:
    """A cell as text: a text is left as it is, a number is spelled as JSON does, and parts of text are joined.

    None and NaN are no text. `where`: the column's name, for the message.

    Raises:
        ValueError: anything else: an image part, an infinite number, half a surrogate pair, which no tokenizer reads.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{where} holds half a surrogate pair (\\ud800 to \\udfff), which is no text: mend it")
        return value
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"{where} is a number that is too large: write it in quotes")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, Mapping) and _kind(part) for part in parts):
        raise ValueError(f"{where} is {a(value)}, and must be a text")
    if any(_kind(part) in TEXT_PARTS and "text" not in part for part in parts):
        raise ValueError(f"{where} has a part without 'text': write it there, or leave the part out")
    if other := next((_kind(part) for part in parts if _kind(part) not in TEXT_PARTS), None):
        raise ValueError(f"{where} has a part of type {other!r}: only text can be learned; leave such rows out")
    return "".join(text_of(part.get("text"), where) for part in parts)


def _kind(part: Mapping[str, Any]) -> str:
    return str(part.get("type") or ("text" if "text" in part else ""))


def a(value: Any) -> str:
    """What a value is, in JSON's words."""
    return "an object" if isinstance(value, Mapping) else KINDS.get(type(value), f"a {type(value).__name__}")


def messages_of(turns: Any, column: str) -> list[Message]:
    """The messages of a conversation in any of the three ways. Raises Blank: it has none; ValueError: a bad turn."""
    if turns is None or turns == []:
        raise Blank(column)
    if not isinstance(turns, list):
        raise ValueError(f"column {column!r} is {a(turns)}, and must be a list of turns")
    if isinstance(turns[0], Mapping):
        return [_message(turn, _turn(column, i)) for i, turn in enumerate(turns)]
    return [said(("user", "assistant")[i % 2], text_of(turn, _turn(column, i))) for i, turn in enumerate(turns)]


def _turn(column: str, index: int) -> str:
    return f"column {column!r}, turn {index + 1}"


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is {a(turn)}, and the first is an object: make them all alike")
    kept = _sharegpt(turn, where) if "from" in turn and "role" not in turn else dict(turn)
    kept = {key: value for key, value in kept.items() if value is not None}
    if "role" not in turn and "from" not in turn:
        raise ValueError(f"{where} has neither role and content nor from and value")
    if not isinstance(kept.get("role"), str):
        raise ValueError(f"{where}: role is {a(turn['role'])}, and must be a text")
    if "function_call" in kept and not kept.get("tool_calls"):  # OpenAI's old form
        kept["tool_calls"] = [kept.pop("function_call")]
    usual = SPEAKERS.get(kept["role"].strip().lower())
    if usual in ("user", "assistant", "system") and usual != kept["role"]:
        raise ValueError(f"{where} has role {kept['role']!r}, which templates don't know: write {usual!r}")
    if kept["role"] == "function":
        kept["role"] = "tool"
    weights = {key: kept.pop(key) for key in NOT_LEARNED if key in kept}
    for key, weight in weights.items():
        if weight not in (0, 1):
            raise ValueError(f"{where}: {key} is {weight!r}, and must be 0 (not learned) or 1")
    if len({*weights.values()}) > 1:
        raise ValueError(f"{where}: {' and '.join(weights)} say different things: leave one")
    if kept["role"] == "assistant" and 0 in weights.values():
        kept["weight"] = 0
    kept["content"] = text_of(kept.get("content"), where)
    kept |= {key: text_of(kept[key], f"{where}, {key}") for key in WORDED if key in kept}
    if calls := kept.pop("tool_calls", None):
        kept["tool_calls"] = _calls(calls, where)
    return kept


def _sharegpt(turn: Mapping[str, Any], where: str) -> Message:
    speaker = turn["from"]
    if speaker not in SPEAKERS:
        raise ValueError(f"{where} is from {speaker!r}, and must be from one of {', '.join(SPEAKERS)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": parsed(turn.get("value"), where, data=True), **rest}
    return {"role": SPEAKERS[speaker], "content": turn.get("value"), **rest}


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls whose arguments are an object where they are one written as text, which a template would quote."""
    calls = parsed(calls, where, data=True)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"{where}: tool_calls must be a list of objects")
    wrapped = [call if "function" in call else {"type": "function", "function": call} for call in calls]
    return [dict(call) | {"function": _function(call["function"], where)} for call in wrapped]


def _function(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError(f"{where}: a tool call's function is {a(call)}, and must be an object")
    if not call.get("name"):
        raise ValueError(f"{where}: a tool call has no name: give it one, or leave the row out")
    arguments = call.get("arguments")
    if "arguments" in call and arguments in (None, ""):  # of a function that takes none
        return dict(call) | {"arguments": {}}
    try:
        arguments = parsed(arguments, where, data=True)
    except RepeatedKey:
        raise
    except ValueError:
        return dict(call)
    return dict(call) | ({"arguments": arguments} if isinstance(arguments, dict) else {})


def parsed(value: Any, where: str, *, data: bool = False) -> Any:
    """What a JSON text says, its numbers as they are written, or as numbers where they are `data`; else the value.

    Raises ValueError: it is no JSON; RepeatedKey: an object has a key twice.
    """
    if not isinstance(value, str):
        return value
    try:
        found = read_json(value)
    except RepeatedKey as error:
        raise RepeatedKey(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is a text, and not valid JSON ({error})") from error
    return found if data else as_written(found)


def tools_of(value: Any) -> list[Any] | None:
    """A row's tools: a list of objects, or the same written as JSON; None where there is none."""
    where = "column 'tools'"
    tools = None if isinstance(value, str) and not value.strip() else parsed(value, where, data=True)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{where} is {a(tools)}, and must be a list")
    tools = [parsed(tool, where, data=True) for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{where} must be a list of objects")
    return tools


def kwargs_of(value: Any) -> dict[str, Any]:
    """A row's `chat_template_kwargs`, an object or one written as JSON; empty where it has none."""
    where = "column 'chat_template_kwargs'"
    found = parsed(value, where, data=True) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is {a(found)}, and must be an object")
    if taken := next((key for key in found if key in NO_OPTIONS), None):
        raise ValueError(f"{where} has {taken!r}, which is no option of a chat template: take it out")
    return dict(found)


def is_blank(message: Message) -> bool:
    """Whether a message says nothing: no content, and no tool call."""
    return not message.get("content", "").strip() and not message.get("tool_calls")


def is_learned(message: Message) -> bool:
    """Whether a message is an answer, and is not marked as one that is not learned (`weight` 0)."""
    return message["role"] == "assistant" and message.get("weight") != 0


def check_turns(messages: list[Message], column: str) -> None:
    """Refuses turns that say nothing, and a conversation that does not end with an answer, or has none to learn.

    Raises Blank: the last turn is no answer, or an empty one; ValueError: anything else.
    """
    if messages and (role := messages[-1]["role"]) not in SPEAKERS.values():
        raise ValueError(f"{_turn(column, len(messages) - 1)} has role {role!r}: the role of an answer is 'assistant'")
    if not messages or messages[-1]["role"] != "assistant" or is_blank(messages[-1]):
        raise Blank(column)
    check_filled(messages, column)
    if not any(is_learned(message) for message in messages):
        raise ValueError(f"column {column!r}: every answer has weight 0, so nothing is learned: leave the row out")


def check_filled(messages: list[Message], column: str) -> None:
    """Refuses turns of user or assistant that say nothing, with a ValueError."""
    for index, message in enumerate(messages):
        if message["role"] in ("user", "assistant") and is_blank(message):
            raise ValueError(f"{_turn(column, index)} ({message['role']}) is empty: fill it, or leave the row out")


def special_ids(tokenizer: Any) -> set[int]:
    """The tokenizer's special tokens, those among them that it has no role for, such as another model's end of turn."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds what the tokenizer reads as a special token."""
    names = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def shared_start(one: Sequence[Any], two: Sequence[Any]) -> int:
    """Length of the common beginning; an answer starts there, as tokens may merge over the seam behind a prompt."""
    return next((place for place, (x, y) in enumerate(zip(one, two)) if x != y), min(len(one), len(two)))
