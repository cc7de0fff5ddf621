"""Numbers as reports write them."""

from lfu.report.text import estimate, sign


def test_no_direction_is_told_where_a_reader_sees_zero():
    tiny = {"value": -0.0002, "low": -0.0003, "high": -0.0001}
    assert estimate(tiny, "+.3f") == "0.000 [0.000, 0.000]"
    assert sign(tiny) == -1
    assert sign(tiny, "+.3f") == 0
    assert sign(tiny, "+.3f", 100) == -1
    assert sign({"value": 0.3, "low": -0.1, "high": 0.7}, "+.1f") == 0
