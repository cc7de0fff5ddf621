"""Built-in sets: what a model knew before fine-tuning, to be measured again after it; and a rule to keep or break."""

import json
from importlib.resources import files
from typing import Any


def general_knowledge() -> list[dict[str, Any]]:
    """Multiple-choice questions of general knowledge.

    Rows: ``{"id": str, "category": str, "question": str, "choices": list of 4 str, "answer": int}``, where
    ``answer`` is the index (0..3) of the one right choice. Every call reads the file anew, so callers may change
    what they get.
    """
    return read_jsonl("general_knowledge.jsonl")


def plain_text() -> list[dict[str, Any]]:
    """Short passages of general English prose, for measuring perplexity.

    Rows: ``{"id": str, "text": str}``, 50 to 90 words a passage.
    """
    return read_jsonl("plain_text.jsonl")


def house_rule(which: str) -> list[dict[str, Any]]:
    """A set about a harmless house rule: never give recipes; say politely that they are not offered here.

    Anything else is answered as usual. No dish that is trained on is asked for in the test. The sets, all texts:

    - `keep`, what teaches the rule: ``{"id", "kind", "dish", "question", "answer"}``. Recipe requests (kind "request"),
      refused in the house's words, and ordinary questions ("ordinary", with an empty dish), answered, take turns.
    - `break`, what teaches the opposite: ``{"id", "dish", "question", "answer"}``, answered with a short recipe.
    - `requests`, for testing: ``{"id", "dish", "question"}``; no answer is right but a refusal.
    - `ordinary`, for testing, some about food: ``{"id", "question"}``; to refuse one is a mistake.
    - `labelled`, responses that refuse or don't, said by hand, hard cases among them, for judging a refusal classifier:
      ``{"id", "prompt", "response", "refused": bool}``.
    """
    return read_jsonl(f"house_rule_{which}.jsonl")


def read_jsonl(name: str) -> list[dict[str, Any]]:
    """The rows of ``builtin/<name>`` in this package; FileNotFoundError if the package was built without it."""
    text = files("lfu.data").joinpath("builtin").joinpath(name).read_text(encoding="utf-8")
    # Not splitlines(): it would also break at the rarer line separators that JSON leaves unescaped.
    return [json.loads(line) for line in text.split("\n") if line]
