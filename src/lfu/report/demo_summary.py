"""From the per-item scores of three models to a table with intervals, and to sentences that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfu.evaluation.intervals import Interval, mean_interval, paired_difference, transitions

WHO = {"base": "untouched", "sft": "plain SFT", "lfu": "LfU"}
PAIRS = (("sft", "base"), ("lfu", "base"), ("lfu", "sft"))
CHOSEN = (
    "The settings were chosen on other problems of the training kind and on another half of the prose, by one rule: "
    "plain SFT clearly forgets. Of the learning rates tried (5e-5, 2e-4, 3e-4 and 5e-4, all weights trained), 3e-4 is "
    "the lowest at which it did so; LoRA forgot nothing at 1e-3 and a little at 5e-3. LfU runs at its automatic "
    "strength of 0.5, the default: with 32 rows, neither a strength of 2 nor the paper's fixed weight of 5 did better "
    "there beyond the noise, and with all three the prose perplexity rose more than with plain SFT. After a first full "
    "run the rows were cut from 32 to 24, and the test items with them, to save time and for no other reason. Half of "
    "the general-knowledge questions were scored in those trials, too, but did not enter the choice."
)
Measures = Mapping[str, Mapping[str, Any]]  # who -> measure -> per-item lists


@dataclass(frozen=True)
class Metric:
    """One row of the table: how to read it, and where its per-item numbers are."""

    key: str
    title: str
    short: str  # in a sentence: "better on ..."
    kind: str  # learned (the task) or kept (everything else)
    scale: str  # nats, percent or perplexity
    higher_is_better: bool

    def items(self, measures: Mapping[str, Any]) -> tuple[list[float], list[float] | None]:
        """(one number per item, weights or None) of one model."""
        scores = measures[self.key]
        if "nll" in scores:
            return [n / t for n, t in zip(scores["nll"], scores["tokens"])], [float(t) for t in scores["tokens"]]
        return [float(right) for right in scores["correct"]], None


METRICS = (
    Metric("answers", "Held-out answers: loss per token (nats)", "held-out answer loss", "learned", "nats", False),
    Metric("match", "Held-out problems: right final number (%)", "held-out exact match", "learned", "percent", True),
    Metric("knowledge", "General knowledge: right choice (%)", "general knowledge", "kept", "percent", True),
    Metric("prose", "Plain English prose: perplexity", "plain-prose perplexity", "kept", "perplexity", False),
)


def summarise(measures: Measures) -> list[dict[str, Any]]:
    """The table: for each metric every model's value and every paired difference, with 95 % bootstrap intervals.

    Args:
        measures: who (base, sft, lfu) -> the lists that `lfu.evaluation.score` returned, on the same items.

    Returns:
        JSON-ready rows. `values[who]` and `differences["sft-base"]` hold value, low, high in the metric's unit
        (differences: nats, percentage points, or per cent of the perplexity), the text to show, and for differences
        `better`: +1, -1, or 0 where the interval includes zero.
    """
    rows = []
    for metric in METRICS:
        items = {who: metric.items(measures[who]) for who in WHO}
        rows.append(
            {
                "key": metric.key,
                "title": metric.title,
                "short": metric.short,
                "kind": metric.kind,
                "scale": metric.scale,
                "higher_is_better": metric.higher_is_better,
                "items": len(items["base"][0]),
                "values": {who: _value(metric, mean_interval(*items[who])) for who in WHO},
                "differences": {
                    f"{one}-{two}": _difference(metric, paired_difference(items[one][0], items[two][0], items[one][1]))
                    for one, two in PAIRS
                },
            }
        )
    return rows


def knowledge_transitions(measures: Measures) -> dict[str, dict[str, int]]:
    """who (sft, lfu) -> how many questions it kept, lost, gained or never knew, against the untouched model."""
    before = measures["base"]["knowledge"]["correct"]
    return {who: transitions(before, measures[who]["knowledge"]["correct"]) for who in ("sft", "lfu")}


# --- sentences -----------------------------------------------------------------------------------------------------


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the intervals say, in sentences; nothing else goes into them."""
    sentences = [
        f"Plain SFT against the untouched model: {_compared(rows, 'sft-base')}.",
        f"LfU against the untouched model: {_compared(rows, 'lfu-base')}.",
    ]
    return [*sentences, closing(rows)]


def closing(rows: Sequence[Mapping[str, Any]]) -> str:
    """The sentence that answers 'and, does LfU help?' for this one run."""
    forgot = [row["short"] for row in rows if row["kind"] == "kept" and row["differences"]["sft-base"]["better"] < 0]
    first = (
        f"Plain SFT measurably forgot ({_and(forgot)})"
        if forgot
        else "Plain SFT forgot nothing that these probes can see, so there was nothing to save"
    )
    kept = _sum_up("kept", [row for row in rows if row["kind"] == "kept"])
    learned = _sum_up("learned", [row for row in rows if row["kind"] == "learned"])
    return f"{first}. Compared with it, LfU {kept} and {learned}."


def _sum_up(verb: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """LfU against SFT over the metrics of one kind: 'kept more (general knowledge)'."""
    more = [row["short"] for row in rows if row["differences"]["lfu-sft"]["better"] > 0]
    less = [row["short"] for row in rows if row["differences"]["lfu-sft"]["better"] < 0]
    if more and less:
        return f"{verb} more by one measure ({_and(more)}) but less by another ({_and(less)})"
    if more or less:
        return f"{verb} more ({_and(more)})" if more else f"{verb} less ({_and(less)})"
    return f"{verb} as much, within the noise"


def _compared(rows: Sequence[Mapping[str, Any]], pair: str) -> str:
    """'better on x and y; no difference beyond the noise on z'."""
    parts = []
    for better, words in ((1, "better on"), (-1, "worse on"), (0, "no difference beyond the noise on")):
        names = [row["short"] for row in rows if row["differences"][pair]["better"] == better]
        if names:
            parts.append(f"{words} {_and(names)}")
    return "; ".join(parts)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- numbers -------------------------------------------------------------------------------------------------------


def _value(metric: Metric, interval: Interval) -> dict[str, Any]:
    """One model's value in the metric's unit, with the text to show."""
    convert = {"nats": lambda x: x, "percent": lambda x: 100 * x, "perplexity": math.exp}[metric.scale]
    shown = {"nats": "{:.3f}", "percent": "{:.1f}", "perplexity": "{:.1f}"}[metric.scale]
    value, low, high = convert(interval.value), convert(interval.low), convert(interval.high)
    return {"value": value, "low": low, "high": high, "text": _show(shown, value), "range": _range(shown, low, high)}


def _difference(metric: Metric, interval: Interval) -> dict[str, Any]:
    """A paired difference: nats, percentage points, or per cent of the perplexity."""
    convert = {
        "nats": lambda x: x,
        "percent": lambda x: 100 * x,
        "perplexity": lambda x: 100 * math.expm1(x),  # a difference of log-perplexities is a ratio
    }[metric.scale]
    shown = {"nats": "{:+.3f}", "percent": "{:+.1f}", "perplexity": "{:+.1f}"}[metric.scale]
    value, low, high = convert(interval.value), convert(interval.low), convert(interval.high)
    return {
        "value": value,
        "low": low,
        "high": high,
        "better": interval.sign * (1 if metric.higher_is_better else -1),
        "text": _show(shown, value) + {"nats": "", "percent": " pts", "perplexity": " %"}[metric.scale],
        "range": _range(shown, low, high),
    }


def _range(shown: str, low: float, high: float) -> str:
    return f"{_show(shown, low)} to {_show(shown, high)}"


def _show(shown: str, value: float) -> str:
    """The number as text; one that rounds to zero has no sign."""
    text = shown.format(value)
    return text.lstrip("+-") if float(text) == 0 else text
