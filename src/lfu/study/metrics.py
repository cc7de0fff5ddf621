"""The metrics of a comparison: their names and units, and how each is read from a run's record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lfu.evaluation.prompts import TemplateScores, headline
from lfu.study.rows import chooses
from lfu.study.statistics import Sample

Read = Callable[[Mapping[str, Any]], Sample]  # a run's `measures` -> its scores


@dataclass(frozen=True)
class Metric:
    """What one column of the results is.

    Attributes:
        key: `loss`, `match`, `kept:knowledge`, ..., `wording`, `noise`.
        kind: how a value is shown: `nll` (nats per token), `share` (per cent), `text` (as a perplexity), `cosine`.
        group: `learned`, `kept` or `steady`.
        sign: +1 if more is better, -1 if less is.
    """

    key: str
    title: str
    kind: str
    group: str
    sign: int
    items: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def metrics_of(records: Sequence[Mapping[str, Any]]) -> dict[Metric, Read]:
    """The metrics that the records of all runs allow, with how to read them; the untouched model's is among them.

    Whether the spread over wordings is of accuracies or of losses is decided by all runs together.
    """
    first = records[0]["measures"]
    found: dict[Metric, Read] = {}
    if "gain" in first:
        found[Metric("loss", "held-out loss", "nll", "learned", -1, len(first["gain"]["nll"]))] = lambda m: _per_token(
            m["gain"]
        )
    if "match" in first:
        found[Metric("match", "problems solved", "share", "learned", 1, len(first["match"]["correct"]))] = lambda m: (
            Sample.of([float(right) for right in m["match"]["correct"]])
        )
    for name, scores in first.get("kept", {}).items():
        found |= {_kept_metric(name, scores): _kept_reader(name, choosing=False)}
    if "prompts" in first:
        metric = headline([_templates(record["measures"]) for record in records])
        kind = "share" if metric == "accuracy" else "nll"
        rows = len(next(iter(first["prompts"].values()))["nll"])
        found[Metric("wording", "wording deviation", kind, "steady", -1, rows)] = lambda m: _wording(m, metric)
    if "noise" in first:
        found[Metric("noise", "noise similarity", "cosine", "steady", 1, len(first["noise"]["tokens"]))] = _noise
    return found


def kept_for_choice(name: str) -> Read:
    """The items of a retention set that help to choose."""
    return _kept_reader(name, choosing=True)


def kept_losses(scores: Mapping[str, Any]) -> dict[str, float]:
    """Set -> loss per token, or share of errors, on the items that help to choose."""
    values = {name: _kept_reader(name, choosing=True)({"kept": scores}).value for name in scores}
    return {name: 1 - value if scores[name]["kind"] == "choice" else value for name, value in values.items()}


def validation(measures: Mapping[str, Any]) -> Sample:
    """The loss on the validation rows."""
    return _per_token(measures["validation"])


def _per_token(scores: Mapping[str, Any], wanted: Sequence[bool] | None = None) -> Sample:
    nll, tokens = np.asarray(scores["nll"], dtype=float), np.asarray(scores["tokens"], dtype=float)
    pick = np.ones(len(nll), dtype=bool) if wanted is None else np.asarray(wanted)
    return Sample(nll[pick][None], tokens[pick][None])


def _kept_metric(name: str, scores: Mapping[str, Any]) -> Metric:
    count = sum(not each for each in chooses(len(scores.get("correct") or scores["nll"])))
    if scores["kind"] == "choice":
        title = "general knowledge" if name == "knowledge" else name
        return Metric(f"kept:{name}", title, "share", "kept", 1, count)
    if scores["kind"] == "text":
        title = f"{name} perplexity"
        return Metric(f"kept:{name}", title, "text", "kept", -1, count)
    return Metric(f"kept:{name}", f"{name} loss", "nll", "kept", -1, count)


def _kept_reader(name: str, *, choosing: bool) -> Read:
    def read(measures: Mapping[str, Any]) -> Sample:
        scores = measures["kept"][name]
        values = scores.get("correct") or scores["nll"]
        wanted = [each == choosing for each in chooses(len(values))]
        if scores["kind"] == "choice":
            return Sample.of([float(right) for right, take in zip(values, wanted) if take])
        return _per_token(scores, wanted)

    return read


def _templates(measures: Mapping[str, Any]) -> dict[str, TemplateScores]:
    return {name: TemplateScores(s["nll"], s["tokens"], s["correct"], []) for name, s in measures["prompts"].items()}


def by_template(measures: Mapping[str, Any], kind: str) -> dict[str, float]:
    """Template -> accuracy or loss per token."""
    sample = _wording(measures, "accuracy" if kind == "share" else "nll")
    return dict(zip(measures["prompts"], (sample.over.sum(1) / sample.under.sum(1)).tolist()))


def _wording(measures: Mapping[str, Any], metric: str) -> Sample:
    scores = measures["prompts"].values()
    if metric == "nll":
        over, under = np.array([s["nll"] for s in scores]), np.array([s["tokens"] for s in scores], dtype=float)
    else:
        over = np.array([s["correct"] for s in scores], dtype=float)
        under = np.ones_like(over)
    return Sample(over, under, "std")


def _noise(measures: Mapping[str, Any]) -> Sample:
    noise = measures["noise"]
    return Sample.of(np.mean(noise["cosine"], axis=0).tolist(), noise["tokens"])


def noise_by_layer(measures: Mapping[str, Any]) -> list[float]:
    """Mean cosine of each layer, every token of equal weight."""
    noise = measures["noise"]
    return np.average(noise["cosine"], axis=1, weights=noise["tokens"]).tolist()
