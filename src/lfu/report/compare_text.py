"""How a comparison's numbers are written: values, spreads and differences of each kind of metric."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import stdev
from typing import Any

from lfu.report.text import number
from lfu.study.kinds import KINDS

Metric = Mapping[str, Any]  # as `lfu.study.metrics.Metric.as_dict` gives it


MEANINGS = {
    "loss": "loss on the answers of the test rows (negative log-likelihood), nats per token",
    "match": "test rows answered with the right number, %",
    "kept:knowledge": "built-in questions answered right, %",
    "kept:prose": "perplexity of built-in passages",
    "wording": "standard deviation over wordings of the prompt",
    "noise": "cosine of hidden states with and without noise on the input, mean over the layers",
}


def heading(metric: Metric) -> str:
    """`held-out loss ↓`."""
    return f"{metric['title']} {'↑' if metric['sign'] > 0 else '↓'}"


def meaning(metric: Metric) -> str:
    """What a column holds, and its unit."""
    kind = KINDS[metric["kind"]]
    unit = {"wording": f", {'points' if metric['kind'] == 'share' else kind.unit}"}.get(metric["key"], "")
    return f"{metric['title']}: {MEANINGS.get(metric['key'], kind.unit)}{unit}"


def value(metric: Metric, number_: float) -> str:
    """One value."""
    kind = KINDS[metric["kind"]]
    return number(kind.shown(number_), f".{kind.places}f")


def mean_and_spread(metric: Metric, found: Mapping[str, Any]) -> str:
    """`1.234 ± 0.010` over the seeds; the mean alone with one seed."""
    kind, seeds = KINDS[metric["kind"]], list(found["seeds"].values())
    if len(seeds) < 2:
        return value(metric, found["mean"])
    deviation = stdev(kind.shown(each) for each in seeds)
    return f"{value(metric, found['mean'])} ± {deviation:.{kind.places}f}"


def change(metric: Metric, interval: Mapping[str, Any], *, unit: bool = False) -> str:
    """`-0.012 [-0.020, -0.004]`."""
    kind = KINDS[metric["kind"]]
    middle, low, high = (
        number(kind.change(interval[name]), f"+.{kind.change_places}f") for name in ("value", "low", "high")
    )
    return f"{middle} [{low}, {high}]{f' {kind.change_unit}' if unit else ''}"
