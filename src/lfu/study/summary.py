"""From the runs' records to the study's results: means, paired differences, ranks, costs, what is recommended.

Everything that the report shows is in the record; the report computes nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from statistics import fmean, median
from typing import Any

from lfu.evaluation.intervals import Interval, transitions
from lfu.evaluation.ranks import category_ranks
from lfu.evaluation.record import plain
from lfu.study import metrics
from lfu.study.choose import pareto_front
from lfu.study.metrics import Metric, metrics_of
from lfu.study.plan import Plan
from lfu.study.recommendation import ahead_of_sft, recommended, validation
from lfu.study.rows import chooses
from lfu.study.scores import Record, Records, Scores

ByLabel = dict[str, Any]  # label of a setting -> something of it


def outcome(
    plan: Plan, base: Record | None, gathered: Mapping[str, Records], failed: Mapping[str, AbstractSet[str]]
) -> dict[str, Any]:
    """What the records say: results by mode, what chose, what is recommended.

    Args:
        base: the untouched model's record, None while there is none.
        gathered, failed: mode -> the records of its finished runs, and the labels of settings of which a run failed.
    """
    if base is None:
        return {"metrics": {}, "untouched": {}, "modes": {}, "validation": {}, "recommended": None, "ahead": None}
    every = [record for records in gathered.values() for each in records.values() for record in each.values()]
    readers = metrics_of([base, *every])
    scores = {mode: Scores(plan.settings, base, records, failed[mode], readers) for mode, records in gathered.items()}
    modes = {mode: _results(each) for mode, each in scores.items()}
    chosen = best = ahead = None
    if scores:
        main = "steps" if "steps" in scores else "time"  # the mode whose runs choose
        chosen = validation(scores[main])
        best = chosen and recommended(scores[main], chosen, modes[main]["against_sft"], plan.rates, main)
        ahead = ahead_of_sft(scores[main], modes[main]["against_sft"])
    return plain({
        "metrics": {metric.key: metric for metric in readers},
        "untouched": {metric.key: read(base["measures"]).value for metric, read in readers.items()},
        "modes": modes, "validation": chosen or {}, "recommended": best, "ahead": ahead,
    })  # fmt: skip


def _results(scores: Scores) -> dict[str, Any]:
    """The results of one mode."""
    records, readers = scores.records, scores.readers
    rivals = {label: rival for label in records if (rival := scores.rival(label))}
    values: dict[str, ByLabel] = {}
    against_base: dict[str, dict[str, Any]] = {}
    against_sft: dict[str, dict[str, Interval]] = {}
    for metric, read in readers.items():
        by_seed = {label: {seed: one.value for seed, one in scores.of(label, read).items()} for label in records}
        values[metric.key] = {label: {"seeds": each, "mean": fmean(each.values())} for label, each in by_seed.items()}
        against_base[metric.key] = {label: scores.difference(label, None, read) for label in records}
        differences = {label: scores.difference(label, rival, read) for label, rival in rivals.items()}
        against_sft[metric.key] = {label: found for label, found in differences.items() if found is not None}
    return {
        "values": values,
        "against_untouched": against_base,
        "against_sft": against_sft,
        "ranks": _ranks(values, scores),
        "failed": [label for label in records if label in scores.failed],
        "fronts": _fronts(against_base, list(readers)),
        "changes": _changes(scores),
        "cost": _costs(scores),
        "curves": _of_runs(records, lambda record: record["curve"]),
        "forgetting": _of_runs(records, lambda record: record.get("forgetting", [])),
        "noise": _noise(scores),
        "wording": _wording(scores),
        "items": {"untouched": _items(scores.base)} | _of_runs(records, _items),
    }


def _of_runs(records: Records, take: Callable[[Record], Any]) -> ByLabel:
    """label -> seed -> what is taken of its record."""
    return {label: {str(seed): take(record) for seed, record in each.items()} for label, each in records.items()}


def _ranks(values: Mapping[str, ByLabel], scores: Scores) -> dict[str, Any]:
    """Ranks by metric, over the means as they are shown; their mean by category; and the mean of these.

    Categories, as the paper has them, so that ten sets to keep don't outvote what was learned. The paper ranks each
    category's average; here the columns of a category have different units, and their ranks are averaged.
    """
    labels, seeds = scores.ranked
    if len(labels) < 2 or not seeds or not scores.readers:
        return {}
    by_metric: dict[str, ByLabel] = {}
    categories: dict[str, list[ByLabel]] = {}
    for metric in scores.readers:
        means = {label: fmean(values[metric.key][label]["seeds"][seed] for seed in seeds) for label in labels}
        shown = {label: metric.sign * metric.scale.shown(mean) for label, mean in means.items()}
        by_metric[metric.key] = category_ranks(shown, decimals=metric.scale.places)
        categories.setdefault(_category(metric), []).append(by_metric[metric.key])
    mean = lambda ranks: {label: fmean(each[label] for each in ranks) for label in labels}
    by_category = {name: mean(ranks) for name, ranks in categories.items()}
    average = mean(by_category.values())
    return {"by_metric": by_metric, "by_category": by_category, "average": average, "seeds": list(seeds)}


def _category(metric: Metric) -> str:
    """What a metric counts towards in the rank."""
    if metric.group == "kept":
        return "kept knowledge" if metric.kind == "share" else "kept language"
    return "steady" if metric.group == "reworded" else metric.group


def _fronts(against_base: Mapping[str, ByLabel], known: list[Metric]) -> dict[str, Any]:
    """Gain against what was kept, as changes against the untouched model, more is better; one picture per kept set."""
    fronts = {}
    pairs = ((gain, kept) for gain in known for kept in known if gain.key == "loss" and kept.group == "kept")
    for gain, kept in pairs:
        gained = against_base[gain.key]
        points = {label: (gain.sign * gained[label].value, kept.sign * change.value)
                  for label, change in against_base[kept.key].items()}  # fmt: skip
        fronts[kept.key] = {"gain": gain.key, "front": pareto_front(points | {"untouched": (0.0, 0.0)})}
    return fronts


def _changes(scores: Scores) -> dict[str, ByLabel]:
    """Questions gained and lost against the untouched model, by set: means over the seeds."""

    def reported(record: Record, name: str) -> list[bool]:
        correct = record["measures"]["kept"][name]["correct"]
        return [bool(right) for right, choosing in zip(correct, chooses(len(correct))) if not choosing]

    def means(name: str, records: Iterable[Record]) -> dict[str, float]:
        before = reported(scores.base, name)
        each = [transitions(before, reported(record, name)) for record in records]
        return {what: fmean(counts[what] for counts in each) for what in each[0]}

    choices = [name for name, kept in scores.base["measures"].get("kept", {}).items() if kept["kind"] == "choice"]
    return {name: {label: means(name, each.values()) for label, each in scores.records.items()} for name in choices}


def _costs(scores: Scores) -> ByLabel:
    """Medians over the seeds; the ratio is to the yardstick of the same study."""
    each = {label: list(records.values()) for label, records in scores.records.items()}
    steps = {label: median(run["cost"]["step_seconds"] for run in runs) for label, runs in each.items()}
    yardsticks = {one.label: steps.get(one.yardstick.label) for one in scores.settings}
    found = {}
    for label, runs in each.items():
        costs, first, yardstick = [run["cost"] for run in runs], runs[0], yardsticks[label]
        memory = [cost["peak_memory"] for cost in costs if cost["peak_memory"] is not None]
        distances = [run["measures"]["distance"] for run in runs]
        found[label] = {
            **{name: median(cost[name] for cost in costs) for name in
               ("step_seconds", "train_seconds", "prepare_seconds", "measure_seconds")},
            "ratio": steps[label] / yardstick if yardstick else None,
            "unsteady": max(cost["unsteady"] for cost in costs),
            "peak_memory": median(memory) if memory else None,
            "memory_of": costs[0]["memory_of"],
            "machines": sorted({cost["machine"] for cost in costs}),
            "steps": first["steps"], "rows": first["rows"], "trainable": first["trainable"],
            "distance": None if None in distances else fmean(distances),
        }  # fmt: skip
    return found


def _noise(scores: Scores) -> ByLabel:
    """label -> layer -> cosine, means over the seeds."""
    if "noise" not in scores.base["measures"]:
        return {}
    lines = lambda each: [metrics.noise_by_layer(record["measures"]) for record in each.values()]
    return {label: [fmean(layer) for layer in zip(*lines(each))] for label, each in scores.with_untouched.items()}


def _wording(scores: Scores) -> dict[str, Any]:
    """label -> template -> its value in each seed: the wording deviation is one of a seed's wordings, not of means."""
    kind = next((metric.kind for metric in scores.readers if metric.key == "wording"), None)
    if kind is None:
        return {}
    found = {}
    for label, each in scores.with_untouched.items():
        seeds = [metrics.by_template(record["measures"], kind) for record in each.values()]
        found[label] = {template: [one[template] for one in seeds] for template in seeds[0]}
    return {"kind": kind, "templates": found}


def _items(record: Record) -> dict[str, Any]:
    """Every score of every item, so that anything can be compared again; of texts and layers runs keep more."""
    found = {name: dict(each) for name, each in record["measures"].items() if isinstance(each, Mapping)}
    found.get("match", {}).pop("text", None)
    if "noise" in found:
        found["noise"]["cosine"] = [fmean(row) for row in zip(*found["noise"]["cosine"])]
    return found
