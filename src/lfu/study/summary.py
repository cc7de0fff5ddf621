"""From the runs' records to the study's record: means, paired differences, ranks, costs, what is recommended.

Everything that the report shows is in the record; the report computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from lfu.evaluation.forgetting import forgetting
from lfu.evaluation.ranks import category_ranks
from lfu.study import metrics
from lfu.study.choose import compared_with, pareto_front
from lfu.study.description import collapse_of, described, runs_of, same_for_all, searched
from lfu.study.kinds import KINDS
from lfu.study.metrics import Metric, Read, metrics_of
from lfu.study.plan import UNTOUCHED, Plan, Run
from lfu.study.recommendation import Records, in_common, main_mode, paired, recommended, samples, validation
from lfu.study.rows import chooses
from lfu.study.settings import Setting
from lfu.study.statistics import Spread, difference
from lfu.study.study import Study


def results_of(study: Study, plan: Plan) -> dict[str, Any]:
    """The results, JSON-ready, of what is finished so far."""
    gathered = {mode: _records(study, runs) for mode, runs in plan.runs.items()}
    failed = {
        mode: {run.label for each in runs.values() for run in each if study.shelf(run).any_failure}
        for mode, runs in plan.runs.items()
    }
    return {
        **outcome(plan, study.shelf(UNTOUCHED).record, gathered, failed),
        "settings": {s.label: described(study, s, plan) for s in plan.settings},
        "search": searched(study, plan),
        "runs": [{**asdict(run), "weights": run.weights} for run in runs_of(study, plan)],
        "collapse": collapse_of(study, plan),
        "same": same_for_all(study, plan),
        "left_out": dict(study.exam.left_out),
        "whole": plan.whole and not study.open_tasks(plan),
    }


def outcome(
    plan: Plan, base: Mapping[str, Any] | None, gathered: Mapping[str, Records], failed: Mapping[str, AbstractSet[str]]
) -> dict[str, Any]:
    """What the records say: results by mode, what chose, what is recommended.

    Args:
        base: the untouched model's record, None while there is none.
        gathered: mode -> the records of its finished runs.
        failed: mode -> the labels of the settings of which a run failed.
    """
    if base is None:
        return {"metrics": {}, "untouched": {}, "modes": {}, "validation": {}, "recommended": None}
    everything = [record for records in gathered.values() for each in records.values() for record in each.values()]
    readers = metrics_of([base, *everything])
    modes = {mode: _mode(plan, records, failed[mode], base, readers) for mode, records in gathered.items()}
    chosen = best = None
    if gathered:
        main = main_mode(gathered)
        chosen = validation(plan, base, gathered[main], failed[main])
        best = recommended(plan, chosen, modes[main]["against_sft"], gathered[main], main, readers)
    return {
        "metrics": {metric.key: metric.as_dict() for metric in readers},
        "untouched": {metric.key: read(base["measures"]).value for metric, read in readers.items()},
        "modes": modes,
        "validation": asdict(chosen) if chosen else {},
        "recommended": asdict(best) if best else None,
    }


# --- per mode --------------------------------------------------------------------------------------------------------


def _records(study: Study, runs: Mapping[Setting, Sequence[Run]]) -> Records:
    """The finished runs."""
    found: Records = {}
    for setting, each in runs.items():
        done = {run.seed: record for run in each if (record := study.shelf(run).record) is not None}
        if done:
            found[setting.label] = done
    return found


def _mode(
    plan: Plan, records: Records, failed: AbstractSet[str], base: Mapping[str, Any], readers: Mapping[Metric, Read]
) -> dict[str, Any]:
    yardsticks = {setting.label: setting.yardstick.label for setting in plan.settings}
    rivals = {s.label: rival.label for s in plan.settings if (rival := compared_with(s, plan.settings))}
    values: dict[str, Any] = {}
    against_base: dict[str, Any] = {}
    against_sft: dict[str, Any] = {}
    for metric, read in readers.items():
        scores = {label: samples(each, read) for label, each in records.items()}
        before = read(base["measures"])
        values[metric.key] = {label: _spread(each) for label, each in scores.items()}
        against_base[metric.key] = {
            label: asdict(difference(list(each.values()), [before])) for label, each in scores.items()
        }
        against_sft[metric.key] = {
            label: asdict(found)
            for label, each in scores.items()
            if label in rivals and (found := paired(each, scores.get(rivals[label], {}))) is not None
        }
    return {
        "values": values,
        "against_untouched": against_base,
        "against_sft": against_sft,
        "ranks": _ranks(values, readers, *in_common(records, failed)),
        "failed": [label for label in records if label in failed],
        "fronts": _fronts(against_base, readers),
        "changes": _changes(records, base),
        "cost": _costs(records, yardsticks),
        "curves": {label: {seed: record["curve"] for seed, record in each.items()} for label, each in records.items()},
        "forgetting": {
            label: {seed: record.get("forgetting", []) for seed, record in each.items()}
            for label, each in records.items()
        },
        "noise": _noise(records, base),
        "wording": _wording(records, base, readers),
        "items": _items(records, base),
    }


def _spread(samples: Mapping[int, Any]) -> dict[str, Any]:
    spread = Spread({seed: sample.value for seed, sample in samples.items()})
    return {"seeds": spread.seeds, "mean": spread.mean, "deviation": spread.deviation}


def _ranks(
    values: Mapping[str, Any], readers: Mapping[Metric, Read], labels: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Ranks by metric, over the means as they are shown; their mean by category; and the mean of these.

    Categories, as the paper has them, so that ten sets to keep don't outvote what was learned. The paper ranks each
    category's average; here the columns of a category have different units, and their ranks are averaged.
    """
    if len(labels) < 2 or not seeds or not readers:
        return {}
    each = {}
    for metric in readers:
        kind = KINDS[metric.kind]
        means = {label: fmean(values[metric.key][label]["seeds"][seed] for seed in seeds) for label in labels}
        shown = {label: metric.sign * kind.shown(mean) for label, mean in means.items()}
        each[metric.key] = category_ranks(shown, decimals=kind.places)
    categories: dict[str, list[str]] = {}
    for metric in readers:
        categories.setdefault(_category(metric), []).append(metric.key)
    by_category = {
        name: {label: fmean(each[key][label] for key in keys) for label in labels} for name, keys in categories.items()
    }
    average = {label: fmean(ranks[label] for ranks in by_category.values()) for label in labels}
    return {"by_metric": each, "by_category": by_category, "average": average, "seeds": list(seeds)}


def _category(metric: Metric) -> str:
    """What a metric counts towards in the rank."""
    if metric.group != "kept":
        return metric.group
    return "kept knowledge" if metric.kind == "share" else "kept language"


def _fronts(against_base: Mapping[str, Any], readers: Mapping[Metric, Read]) -> dict[str, Any]:
    """Gain against what was kept, as changes against the untouched model, more is better; one picture a kept set."""
    gain = next((metric for metric in readers if metric.key == "loss"), None)
    fronts = {}
    for kept in (metric for metric in readers if metric.group == "kept"):
        if gain is None:
            break
        points = {
            label: (gain.sign * against_base[gain.key][label]["value"], kept.sign * change["value"])
            for label, change in against_base[kept.key].items()
        }
        points["untouched"] = (0.0, 0.0)
        fronts[kept.key] = {"gain": gain.key, "front": pareto_front(points)}
    return fronts


def _changes(records: Records, base: Mapping[str, Any]) -> dict[str, Any]:
    """Items gained and lost against the untouched model, by set: means over the seeds."""
    found: dict[str, Any] = {}
    for name, scores in base["measures"].get("kept", {}).items():
        if scores["kind"] != "choice":
            continue
        report = [not each for each in chooses(len(scores["correct"]))]
        pick = lambda correct, report=report: [bool(c) for c, take in zip(correct, report) if take]
        found[name] = {}
        for label, each in records.items():
            changes = [
                forgetting(pick(scores["correct"]), pick(record["measures"]["kept"][name]["correct"]))
                for record in each.values()
            ]
            found[name][label] = {
                what: fmean(getattr(change, what) for change in changes) for what in ("kept", "lost", "gained", "never")
            }
    return found


def _costs(records: Records, yardsticks: Mapping[str, str]) -> dict[str, Any]:
    """Medians over the seeds; the ratio is to the yardstick of the same study."""
    steps = {
        label: median(record["cost"]["step_seconds"] for record in each.values()) for label, each in records.items()
    }
    found = {}
    for label, each in records.items():
        costs = [record["cost"] for record in each.values()]
        memory = [cost["peak_memory"] for cost in costs if cost["peak_memory"] is not None]
        yardstick = steps.get(yardsticks[label])
        distances = [record["measures"]["distance"] for record in each.values()]
        found[label] = {
            "steps": next(iter(each.values()))["steps"],
            "step_seconds": steps[label],
            "ratio": steps[label] / yardstick if yardstick else None,
            "unsteady": max(cost["unsteady"] for cost in costs),
            "train_seconds": median(cost["train_seconds"] for cost in costs),
            "prepare_seconds": median(cost["prepare_seconds"] for cost in costs),
            "measure_seconds": median(cost["measure_seconds"] for cost in costs),
            "peak_memory": median(memory) if memory else None,
            "memory_of": costs[0]["memory_of"],
            "machines": sorted({cost["machine"] for cost in costs}),
            "rows": next(iter(each.values()))["rows"],
            "trainable": next(iter(each.values()))["trainable"],
            "distance": fmean(distances) if None not in distances else None,
        }
    return found


def _noise(records: Records, base: Mapping[str, Any]) -> dict[str, Any]:
    """label -> layer -> cosine, means over the seeds."""
    if "noise" not in base["measures"]:
        return {}
    found = {"untouched": metrics.noise_by_layer(base["measures"])}
    for label, each in records.items():
        lines = [metrics.noise_by_layer(record["measures"]) for record in each.values()]
        found[label] = [fmean(layer) for layer in zip(*lines)]
    return found


def _wording(records: Records, base: Mapping[str, Any], readers: Mapping[Metric, Read]) -> dict[str, Any]:
    """label -> template -> its value in each seed: the wording deviation is one of a seed's wordings, not of means."""
    metric = next((each for each in readers if each.key == "wording"), None)
    if metric is None:
        return {}
    found = {}
    every: Records = {"untouched": {0: dict(base)}, **records}
    for label, each in every.items():
        seeds = [metrics.by_template(record["measures"], metric.kind) for record in each.values()]
        found[label] = {template: [one[template] for one in seeds] for template in seeds[0]}
    return {"kind": metric.kind, "templates": found}


def _items(records: Records, base: Mapping[str, Any]) -> dict[str, Any]:
    """Every score of every item, so that anything can be compared in pairs again; of texts and layers the runs' own
    records have more."""

    def scores(measures: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: dict(each) for name, each in measures.items() if isinstance(each, Mapping)}
        if "match" in found:
            del found["match"]["text"]
        if "noise" in found:
            found["noise"]["cosine"] = [fmean(row) for row in zip(*found["noise"]["cosine"])]
        return found

    return {"untouched": scores(base["measures"])} | {
        label: {str(seed): scores(record["measures"]) for seed, record in each.items()}
        for label, each in records.items()
    }
