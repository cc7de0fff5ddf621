"""Numbers as reports write them."""

import pytest

from lfu.report.text import by_chance, estimate, sign


@pytest.mark.parametrize(("intervals", "about"), [(4, ""), (5, "0.2"), (45, "2"), (190, "10"), (300, "15")])
def test_how_many_intervals_miss_by_chance_is_written_out(intervals, about):
    assert by_chance(intervals).partition("about ")[2].partition(" ")[0] == about


def test_no_direction_is_told_where_a_reader_sees_zero():
    tiny = {"value": -0.0002, "low": -0.0003, "high": -0.0001}
    assert estimate(tiny, "+.3f") == "0.000 [0.000, 0.000]"
    assert sign(tiny) == -1
    assert sign(tiny, "+.3f") == 0
    assert sign(tiny, "+.3f", 100) == -1
    assert sign({"value": 0.3, "low": -0.1, "high": 0.7}, "+.1f") == 0
