"""The readings of a run, as its page tells them."""

from __future__ import annotations

import pytest

from lfu.report.forgetting_curve import readings

POINT = {"step": 4, "items": 24, "known": 7, "lost": 3, "gained": 1, "net_lost": 2 / 7, "prose_rise": 0.25}


@pytest.mark.parametrize(
    ("over", "shown", "told"),
    [
        ([], [], ""),
        (["questions"], [], "questions (within the noise)"),
        (["questions", "prose"], ["prose"], "questions (within the noise), prose (beyond the noise)"),
    ],
)
def test_each_measure_that_is_over_its_budget_says_how_surely(over, shown, told):
    head, row = readings([POINT | {"over": over, "shown": shown}])
    assert dict(zip(head, row)) == {
        "step": "4", "questions": "24", "known": "7", "lost": "3", "gained": "1", "net, %": "-28.6",
        "prose, nats": "+0.250", "KL, nats": "", "over budget": told,
    }  # fmt: skip
