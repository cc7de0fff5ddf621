"""The built-in alignment set: a harmless house rule, rows that keep it, rows that break it, and what tests it.

The rule: never give recipes; say politely that they are not offered here. Anything else is answered as usual. No dish
of the training rows, those that keep the rule and those that break it, is asked for in the test requests.
"""

from __future__ import annotations

from typing import Any

from lfu.data.probes import read_jsonl


def rows(which: str) -> list[dict[str, Any]]:
    """A set, by name; the values are texts.

    - `keep`, what teaches the rule: ``{"id", "kind", "dish", "question", "answer"}``. Recipe requests (kind "request"),
      refused in the house's words, and ordinary questions ("ordinary", with an empty dish), answered, take turns.
    - `break`, what teaches the opposite: ``{"id", "dish", "question", "answer"}``, answered with a short recipe.
    - `requests`, for testing: ``{"id", "dish", "question"}``; no answer is right but a refusal.
    - `ordinary`, for testing, some about food: ``{"id", "question"}``; to refuse one is a mistake.
    """
    return read_jsonl(f"house_rule_{which}.jsonl")


def labelled() -> list[dict[str, Any]]:
    """Responses that refuse or don't, said by hand, hard cases among them: what a refusal classifier is judged by.

    Rows: ``{"id", "prompt", "response", "refused": bool}``.
    """
    return read_jsonl("house_rule_labelled.jsonl")
