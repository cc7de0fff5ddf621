"""The metrics of a comparison: how each is read from a run's record, how it is shown, and what counts as better."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lfu.evaluation.intervals import Interval
from lfu.evaluation.prompts import TemplateScores, headline, sums
from lfu.study.rows import chooses
from lfu.study.statistics import Sample

Measures = Mapping[str, Any]  # a run's scores, by measure
Read = Callable[[Measures], Sample]


@dataclass(frozen=True)
class Kind:
    """How values and differences of a metric are shown: unit, decimals, and the number that is shown for one."""

    unit: str
    places: int
    change_unit: str
    change_places: int
    shown: Callable[[float], float] = lambda value: value
    change: Callable[[float], float] = lambda difference: difference


KINDS = {
    "nll": Kind("nats per token", 3, "nats per token", 3),
    "share": Kind("%", 1, "points", 1, lambda v: 100 * v, lambda d: 100 * d),
    "text": Kind("perplexity", 2, "%", 1, math.exp, lambda d: 100 * math.expm1(d)),
    "cosine": Kind("cosine", 4, "cosine", 4),
}


@dataclass(frozen=True)
class Metric:
    """What one column of the results is."""

    key: str  # `loss`, `match`, `kept:knowledge`, ..., `reworded`, `wording`, `noise`
    title: str
    kind: str  # one of `KINDS`
    group: str  # `learned`, `kept`, `reworded` or `steady`
    sign: int  # +1 if more is better, -1 if less is
    items: int

    @property
    def scale(self) -> Kind:
        """How its values are shown."""
        return KINDS[self.kind]

    def turn(self, difference: Interval) -> int:
        """+1: a difference is better beyond the noise, -1: worse, 0: neither, or too small to be shown."""
        seen = round(self.scale.change(difference.value), self.scale.change_places) != 0
        return self.sign * difference.sign if seen else 0


def metrics_of(records: Sequence[Mapping[str, Any]]) -> dict[Metric, Read]:
    """The metrics that the records of all runs allow, with how to read them; the untouched model's is among them.

    Whether the answers to reworded prompts are judged by accuracy or by loss is decided by all runs together.
    """
    first = records[0]["measures"]
    found: dict[Metric, Read] = {}

    def add(key: str, title: str, kind: str, group: str, sign: int, read: Read) -> None:
        found[Metric(key, title, kind, group, sign, read(first).items)] = read

    if "gain" in first:
        add("loss", "held-out loss", "nll", "learned", -1, lambda m: _per_token(m["gain"]))
    if "match" in first:
        add("match", "problems solved", "share", "learned", 1, lambda m: Sample.of(m["match"]["correct"]))
    for name, scores in first.get("kept", {}).items():
        title, kind, sign = {
            "choice": ("general knowledge" if name == "knowledge" else name, "share", 1),
            "text": (f"{name} perplexity", "text", -1),
            "answer": (f"{name} loss", "nll", -1),
        }[scores["kind"]]
        add(f"kept:{name}", title, kind, "kept", sign, partial(kept, name, False))
    if "prompts" in first:
        share = headline([_templates(record["measures"]) for record in records]) == "accuracy"
        kind, title = ("share", "reworded accuracy") if share else ("nll", "reworded loss")
        add("reworded", title, kind, "reworded", 1 if share else -1, partial(_wording, kind, "mean"))
        add("wording", "wording deviation", kind, "reworded", -1, partial(_wording, kind, "std"))
    if "noise" in first:
        add("noise", "noise similarity", "cosine", "steady", 1, _noise)
    return found


def kept_losses(scores: Mapping[str, Any]) -> dict[str, float]:
    """Set -> loss per token, or share of errors, on the items that help to choose."""
    values = {name: kept(name, True, {"kept": scores}).value for name in scores}
    return {name: 1 - value if scores[name]["kind"] == "choice" else value for name, value in values.items()}


def validation(measures: Measures) -> Sample:
    """The loss on the validation rows."""
    return _per_token(measures["validation"])


def by_template(measures: Measures, kind: str) -> dict[str, float]:
    """Template -> accuracy or loss per token."""
    sample = _wording(kind, "mean", measures)
    return dict(zip(measures["prompts"], (sample.over.sum(1) / sample.under.sum(1)).tolist()))


def noise_by_layer(measures: Measures) -> list[float]:
    """Mean cosine of each layer, every token of equal weight."""
    noise = measures["noise"]
    return np.average(noise["cosine"], axis=1, weights=noise["tokens"]).tolist()


def _per_token(scores: Mapping[str, Any]) -> Sample:
    return Sample(np.array([scores["nll"]], dtype=float), np.array([scores["tokens"]], dtype=float))


def kept(name: str, choosing: bool, measures: Measures) -> Sample:
    """A set to keep: the items that help to choose, or those that don't."""
    scores = measures["kept"][name]
    sample = Sample.of(scores["correct"]) if scores["kind"] == "choice" else _per_token(scores)
    wanted = np.array(chooses(sample.items)) == choosing
    return Sample(sample.over[:, wanted], sample.under[:, wanted])


def _templates(measures: Measures) -> dict[str, TemplateScores]:
    return {name: TemplateScores(s["nll"], s["tokens"], s["correct"], []) for name, s in measures["prompts"].items()}


def _wording(kind: str, how: str, measures: Measures) -> Sample:
    return Sample(*sums(_templates(measures), "accuracy" if kind == "share" else "nll"), how)


def _noise(measures: Measures) -> Sample:
    noise = measures["noise"]
    return Sample.of(np.mean(noise["cosine"], axis=0), noise["tokens"])
