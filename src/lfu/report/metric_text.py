"""How numbers of each kind of metric are written: values, spreads and differences."""

from collections.abc import Mapping
from statistics import stdev
from typing import Any

from lfu.evaluation.intervals import Interval
from lfu.report.text import and_, number
from lfu.study.metrics import Metric

MEANINGS = {
    "loss": "loss on the answers of the test rows (negative log-likelihood), nats per token",
    "match": "test rows answered with the right number, %",
    "kept:knowledge": "built-in questions answered right, %",
    "kept:prose": "perplexity of built-in passages",
    "reworded": "mean over wordings of the prompt, {}",
    "wording": "standard deviation over wordings of the prompt, {}",
    "noise": "cosine of hidden states with and without noise on the input, mean over the layers",
}
# Group of metrics -> the axis that it is on: what a method is ahead on or behind on.
AXES = {"learned": "the target", "reworded": "reworded prompts", "kept": "other skills", "steady": "noisy input"}
TURNS = {1: "ahead", -1: "behind", 0: "not measurably different"}


def metrics_in(results: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics of a record, by key."""
    return {key: Metric(**one) for key, one in results["metrics"].items()}


def heading(metric: Metric) -> str:
    """`held-out loss ↓`."""
    return f"{metric.title} {'↑' if metric.sign > 0 else '↓'}"


def meaning(metric: Metric) -> str:
    """What a column holds, and its unit."""
    unit = metric.scale.change_unit if metric.key == "wording" else metric.scale.unit
    return f"{metric.title}: {MEANINGS.get(metric.key, '{}').format(unit)}"


def value(metric: Metric, found: float) -> str:
    """One value."""
    return number(metric.scale.shown(found), f".{metric.scale.places}f")


def estimated(metric: Metric, interval: Mapping[str, Any]) -> str:
    """`0.123 [0.101, 0.140]`, of values."""
    return "{} [{}, {}]".format(*(value(metric, interval[name]) for name in ("value", "low", "high")))


def mean_and_spread(metric: Metric, found: Mapping[str, Any]) -> str:
    """`1.234 ± 0.010` over the seeds; the mean alone with one seed."""
    seeds = [metric.scale.shown(each) for each in found["seeds"].values()]
    spread = f" ± {stdev(seeds):.{metric.scale.places}f}" if len(seeds) > 1 else ""
    return value(metric, found["mean"]) + spread


def change(metric: Metric, interval: Mapping[str, Any]) -> str:
    """`-0.012 [-0.020, -0.004]`."""
    ends = (number(metric.scale.change(interval[name]), f"+.{metric.scale.change_places}f")
            for name in ("value", "low", "high"))  # fmt: skip
    return "{} [{}, {}]".format(*ends)


def turn(metric: Metric, interval: Mapping[str, Any]) -> int:
    """As `Metric.turn`."""
    return metric.turn(Interval(**interval))


def told(metric: Metric, interval: Mapping[str, Any]) -> str:
    """`held-out loss -0.012 [-0.020, -0.004] nats per token`."""
    return f"{metric.title} {change(metric, interval)} {metric.scale.change_unit}"


def by_axis(metrics: Mapping[str, Metric], turns: Mapping[str, int], changes: Mapping[str, Any]) -> str:
    """`ahead on the target (...) and other skills (...); not measurably different on reworded prompts (...)`.

    Args:
        turns: metric -> +1 if it is better, -1 if worse, 0 if neither.
        changes: metric -> the interval that is shown for it, if it is better or worse.
    """
    parts = []
    for turn, word in TURNS.items():
        axes = []
        for group, axis in AXES.items():
            keys = [key for key, its in turns.items() if its == turn and metrics[key].group == group]
            each = [told(metrics[key], changes[key]) if turn else metrics[key].title for key in keys]
            axes += [f"{axis} ({', '.join(each)})"] if keys else []
        parts += [f"{word} on {and_(axes)}"] if axes else []
    return "; ".join(parts)
