"""What a comparison's report says is alike, on records that were made up."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from made_up import made_results, made_view, several

from lfu.report.blocks import Paragraph


def alike(results: dict[str, Any]) -> list[str]:
    """What is said under "What is fair here" before the rows."""
    said = [block.text for block in made_view(results).blocks if isinstance(block, Paragraph)]
    start = next(i for i, text in enumerate(said) if text.startswith("Alike for all"))
    return list(takewhile(lambda text: not text.startswith("Chosen on"), said[start:]))


def test_what_is_alike_is_said_and_nothing_else():
    results = made_results({"steps": {"sft": several(1.0), "gem": several(1.0)}})
    assert alike(results) == [
        "Alike for all: the same untouched model, the same 28 training rows in the same order for a seed, 4 rows per "
        "step, 3 steps each, the same learning rates tried (1), the optimizer adamw, a schedule that is linear, "
        "warm-up 0, the same seeds (0, 1, 2), and the same items in every measurement."
    ]


def test_what_is_not_alike_is_said_with_who_has_what():
    """More rows are more steps; a learning rate of one's own is not searched; replay brings rows along."""
    results = made_results({"steps": {"sft": several(1.0), "sft:data_limit=14": several(1.0), "replay": several(1.0)}})
    few, replay = results["settings"]["sft data_limit=14"], results["settings"]["replay"]
    few["training"] |= {"training rows": "14", "learning rates tried": "3"}
    few["steps"] = {"steps": 2}
    replay["places"] = ["mixture"]
    told = alike(results)
    for clause in ("28 training rows", "steps each", "learning rates"):
        assert clause not in told[0]
    assert told[1] == (
        "Not alike: training rows: 28 (sft and replay), 14 (sft data_limit=14). steps: 3 (sft and replay), 2 (sft "
        "data_limit=14). learning rates tried: 1 (sft and replay), 3 (sft data_limit=14)."
    )
    assert told[2] == "Of the training rows, replay mixes other rows in."


def test_equal_time_is_what_is_alike_where_steps_are_not():
    results = made_results({"time": {"sft": several(1.0), "gem": several(1.0)}})
    assert "the time of plain SFT's run each, the same seeds" in alike(results)[0]
    assert "steps each" not in alike(results)[0]
    both = {mode: {"sft": several(1.0), "gem": several(1.0)} for mode in ("steps", "time")}
    assert "the time of plain SFT's run each where time is equal, the same seeds" in alike(made_results(both))[0]
