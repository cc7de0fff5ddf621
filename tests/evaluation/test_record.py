"""The record of a measurement: what goes into it comes out as JSON."""

from __future__ import annotations

import json

from lfu.evaluation.forgetting import forgetting
from lfu.evaluation.intervals import Interval
from lfu.evaluation.record import make_record, plain


def test_dataclasses_anywhere_in_the_results_become_mappings():
    interval = Interval(1.0, 0.5, 1.5)
    found = plain({"a": [interval, (interval, 2)], "b": {"c": forgetting([True, False], [True, True])}})
    as_mapping = {"value": 1.0, "low": 0.5, "high": 1.5, "level": 0.95}
    assert found["a"] == [as_mapping, [as_mapping, 2]]
    assert found["b"]["c"]["gained"] == 1
    assert found["b"]["c"]["net"].keys() == as_mapping.keys()


def test_a_record_is_json_as_it_is():
    record = make_record(
        "noise", models={"m": {"name": "m"}}, settings={"limit": 3}, results={"overall": Interval(1.0, 0.5, 1.5)},
        command="lfu probe noise m", seed=7,
    )  # fmt: skip
    assert json.loads(json.dumps(record)) == record
    assert record["results"]["overall"]["low"] == 0.5
