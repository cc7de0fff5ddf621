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
from lfu.evaluation.intervals import Interval
from lfu.evaluation.ranks import category_ranks
from lfu.report.compare_text import KINDS, turn
from lfu.study import metrics
from lfu.study.choose import Candidate, candidate, compared_with, edge_of, held_against, pareto_front
from lfu.study.metrics import Metric, Read, metrics_of
from lfu.study.plan import UNTOUCHED, Plan, Run
from lfu.study.rows import chooses
from lfu.study.settings import Setting
from lfu.study.statistics import Spread, difference
from lfu.study.study import Study

Records = dict[str, dict[int, dict[str, Any]]]  # label -> seed -> a run's record


def results_of(study: Study, plan: Plan) -> dict[str, Any]:
    """The results, JSON-ready, of what is finished so far."""
    gathered = {mode: _records(study, runs) for mode, runs in plan.runs.items()}
    failed = {
        mode: {run.label for each in runs.values() for run in each if study.shelf(run).any_failure}
        for mode, runs in plan.runs.items()
    }
    return {
        **outcome(plan, study.shelf(UNTOUCHED).record, gathered, failed),
        "settings": {s.label: _described(study, s, plan) for s in plan.settings},
        "search": _search(study, plan),
        "runs": _runs(study, plan),
        "collapse": _collapse(study, plan),
        "same": _same(study),
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
    results = {
        "metrics": {metric.key: metric.as_dict() for metric in readers},
        "untouched": {metric.key: read(base["measures"]).value for metric, read in readers.items()},
        "modes": {mode: _mode(plan, records, failed[mode], base, readers) for mode, records in gathered.items()},
        "validation": {},
    }
    if gathered:
        main = _main_mode(gathered)
        results["validation"] = _validation(plan, base, gathered[main], failed[main])
    return results | {"recommended": _recommended(plan, results, gathered, readers)}


# --- per mode --------------------------------------------------------------------------------------------------------


def _records(study: Study, runs: Mapping[Setting, Sequence[Run]]) -> Records:
    """The finished runs."""
    found: Records = {}
    for setting, each in runs.items():
        done = {run.seed: record for run in each if (record := study.shelf(run).record) is not None}
        if done:
            found[setting.label] = done
    return found


def _in_common(records: Records, failed: AbstractSet[str]) -> tuple[list[str], list[int]]:
    """(the settings that can be ranked: those of which no run failed; the seeds that all of them have finished).

    A mean over the seeds that survived is none over all of them: what failed may have failed because the seed was hard.
    """
    labels = [label for label in records if label not in failed]
    seeds = records[labels[0]] if labels else ()
    return labels, [seed for seed in seeds if all(seed in records[label] for label in labels)]


def _mode(
    plan: Plan, records: Records, failed: AbstractSet[str], base: Mapping[str, Any], readers: Mapping[Metric, Read]
) -> dict[str, Any]:
    yardsticks = {setting.label: setting.yardstick.label for setting in plan.settings}
    rivals = {s.label: rival.label for s in plan.settings if (rival := compared_with(s, plan.settings))}
    values: dict[str, Any] = {}
    against_base: dict[str, Any] = {}
    against_sft: dict[str, Any] = {}
    for metric, read in readers.items():
        samples = {label: _read(each, read) for label, each in records.items()}
        before = read(base["measures"])
        values[metric.key] = {label: _spread(each) for label, each in samples.items()}
        against_base[metric.key] = {
            label: asdict(difference(list(each.values()), [before])) for label, each in samples.items()
        }
        against_sft[metric.key] = {
            label: asdict(found)
            for label, each in samples.items()
            if label in rivals and (found := _paired(each, samples.get(rivals[label], {}))) is not None
        }
    return {
        "values": values,
        "against_untouched": against_base,
        "against_sft": against_sft,
        "ranks": _ranks(values, readers, *_in_common(records, failed)),
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


def _read(records: Mapping[int, Mapping[str, Any]], read: Read) -> dict[int, Any]:
    """seed -> the scores."""
    return {seed: read(record["measures"]) for seed, record in records.items()}


def _paired(ours: Mapping[int, Any], theirs: Mapping[int, Any], level: float = 0.95) -> Interval | None:
    """On the seeds that both have finished."""
    seeds = [seed for seed in ours if seed in theirs]
    return difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], level=level) if seeds else None


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


# --- what was chosen -------------------------------------------------------------------------------------------------


def _main_mode(gathered: Mapping[str, Records]) -> str:
    return "steps" if "steps" in gathered else "time"


def _validation(plan: Plan, base: Mapping[str, Any], records: Records, failed: AbstractSet[str]) -> dict[str, Any]:
    """What the choice goes by: the loss on the validation rows, over the seeds that all settings have, and the change
    of each kept set, on the items that choose, against each of what the setting is held against. A setting of which a
    run failed has no loss and is not chosen."""
    if "validation" not in base["measures"]:
        return {}
    labels, seeds = _in_common(records, failed)
    found: dict[str, Any] = {"untouched": metrics.validation(base["measures"]).value, "settings": {}}
    for setting in plan.settings:
        each = records.get(setting.label)
        if not each:
            continue
        against = {}
        for rival in held_against(setting, plan.settings):
            theirs = records.get(rival.label, {}) if rival else dict.fromkeys(each, base)
            against[rival.label if rival else UNTOUCHED.label] = _kept_changes(each, theirs)
        losses = [metrics.validation(each[seed]["measures"]).value for seed in seeds if setting.label in labels]
        found["settings"][setting.label] = {"loss": fmean(losses) if losses else None, "against": against}
    found["seeds"] = seeds
    return found


def _kept_changes(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> dict[str, Any]:
    """Retention set -> the difference on the items that choose; `sign` is +1 where more is better."""
    found = {}
    for name, scores in next(iter(ours.values()))["measures"].get("kept", {}).items():
        read = metrics.kept_for_choice(name)
        change = _paired(_read(ours, read), _read(theirs, read))
        if change is not None:
            found[name] = asdict(change) | {"sign": 1 if scores["kind"] == "choice" else -1}
    return found


def _recommended(
    plan: Plan, results: Mapping[str, Any], gathered: Mapping[str, Records], readers: Mapping[Metric, Read]
) -> dict[str, Any] | None:
    """The setting that the choosing rows prefer, and how it differs from plain SFT on the rows that chose nothing.

    It is better where the interval of 1 - 0.05 / m leaves out zero, of m metrics (Bonferroni): being better in any of
    them is enough to be recommended, and by chance it happens in one study of twenty. It is worse where that of 95 %
    does: the doubt is plain SFT's to gain.
    """
    chosen_by = {
        label: one for label, one in results["validation"].get("settings", {}).items() if one["loss"] is not None
    }
    by_label = {setting.label: setting for setting in plan.settings}
    candidates = [
        Candidate(label, by_label[label].method, one["loss"], _forgets_more(one)) for label, one in chosen_by.items()
    ]
    best = candidate(candidates)
    if best is None:
        return None
    mode = _main_mode(gathered)
    setting = by_label[best.label]
    rival = compared_with(setting, plan.settings) or setting
    found = results["modes"][mode]["against_sft"]
    differences = {key: each[best.label] for key, each in found.items() if best.label in each}
    sure = _surely(gathered[mode], best.label, rival.label, readers, 1 - 0.05 / max(1, len(readers)))
    better = [key for key in differences if turn(results["metrics"][key], sure[key]) > 0]
    worse = [key for key, each in differences.items() if turn(results["metrics"][key], each) < 0]
    return {
        "mode": mode,
        "candidate": best.label,
        "yardstick": rival.label,
        "learning_rate": plan.rates[setting],
        "better": better,
        "worse": worse,
        "same": [key for key in differences if key not in (*better, *worse)],
        "sure": sure,
        "label": best.label if rival == setting or better else rival.label,
        "seeds": len(results["validation"]["seeds"]),
        "excluded": [label for label, one in chosen_by.items() if _forgets_more(one) and one["loss"] < best.validation],
        "runner_up": _runner_up(gathered[mode], best, candidates, results["validation"]["seeds"]),
    }


def _surely(
    records: Records, ours: str, theirs: str, readers: Mapping[Metric, Read], level: float
) -> dict[str, dict[str, Any]]:
    """Metric -> the difference of two settings with an interval of that level; none of a setting to itself."""
    if ours == theirs:
        return {}
    each = {
        metric.key: _paired(_read(records.get(ours, {}), read), _read(records.get(theirs, {}), read), level)
        for metric, read in readers.items()
    }
    return {key: asdict(interval) for key, interval in each.items() if interval is not None}


def _runner_up(
    records: Records, best: Candidate, candidates: Sequence[Candidate], seeds: Sequence[int]
) -> dict[str, Any] | None:
    """What would have been chosen without the best, and its loss on the validation rows minus the best's."""
    second = candidate([each for each in candidates if each.label != best.label])
    if second is None:
        return None
    losses = [
        [metrics.validation(records[label][seed]["measures"]) for seed in seeds] for label in (second.label, best.label)
    ]
    return {"label": second.label, **asdict(difference(*losses))}


def _forgets_more(one: Mapping[str, Any]) -> bool:
    """Whether any kept set is worse, beyond the noise, than that of anything that the setting is held against."""
    changes = [change for each in one["against"].values() for change in each.values()]
    return any(change["sign"] * _beyond(change) < 0 for change in changes)


def _beyond(interval: Mapping[str, Any]) -> int:
    """+1 or -1 where the whole interval lies above or below zero."""
    return int(interval["low"] > 0) - int(interval["high"] < 0)


def _search(study: Study, plan: Plan) -> dict[str, Any]:
    """label -> what was tried and chosen."""
    found = {}
    for setting in study.design.settings:
        rates = study.design.rates_of(setting)
        if len(rates) > 1:
            places = {rate: study.shelf(study.design.first_run(setting, rate)) for rate in rates}
            losses, chosen = {rate: place.validation for rate, place in places.items()}, plan.rates.get(setting)
            found[setting.label] = {
                "chosen": chosen,
                "edge": edge_of(losses, chosen),
                "losses": losses,
                "failed": [rate for rate, place in places.items() if place.any_failure],
            }
    return found


def _collapse(study: Study, plan: Plan) -> dict[str, Any] | None:
    """What the bisection found: value -> loss on the validation rows and whether that is a collapse."""
    bisection = study.design.bisection
    if bisection is None:
        return None
    bar = study.shelf(UNTOUCHED).validation
    plain = bisection.setting(bisection.low).yardstick
    rate = plan.rates.get(plain)
    sft = study.shelf(study.design.first_run(plain, rate)).validation if rate is not None else None
    tried: dict[float, Any] = {}
    for setting in plan.settings:
        place = study.shelf(study.design.first_run(setting, plan.rates[setting])) if setting in plan.rates else None
        given = {**dict(setting.own), **dict(setting.knobs)}
        if place is None or bar is None or setting.method != bisection.method or list(given) != [bisection.key]:
            continue
        loss = place.validation
        if loss is not None or (place.any_failure and place.any_failure["diverged"]):
            tried[float(given[bisection.key])] = {"loss": loss, "collapsed": loss is None or loss > bar}
    holds, collapses = bisection.bracket({value: one["collapsed"] for value, one in tried.items()})
    return {
        "name": bisection.name, "method": bisection.method, "untouched": bar, "sft": sft,
        "holds": holds, "collapses": collapses, "low": bisection.low, "high": bisection.high,
        "tried": {f"{value:g}": tried[value] for value in sorted(tried)},
    }  # fmt: skip


# --- what the runs were ----------------------------------------------------------------------------------------------


def _described(study: Study, setting: Setting, plan: Plan) -> dict[str, Any]:
    """What makes this setting differ from plain SFT, with the command that trains it."""
    from lfu.methods import method_class

    names = [name.strip() for name in setting.method.split("+")]
    rate = plan.rates.get(setting, study.design.rates_of(setting)[0])
    run = study.design.first_run(setting, rate)
    yardstick = Run(setting.yardstick, run.seed, rate, run.steps)
    return {
        "method": setting.method,
        "values": setting.values,
        "yardstick": setting.yardstick.label,
        "against": (compared_with(setting, plan.settings) or UNTOUCHED).label,
        "what": [method_class(name).summary for name in names],
        "differs": _differs(study.configs(run)[0], study.configs(yardstick)[0]),
        "training": _training(study, setting, study.configs(run)[0]),
        "learning_rate": plan.rates.get(setting),
        "steps": {mode: runs[setting][0].steps for mode, runs in plan.runs.items() if setting in runs},
        "places": [place for name in names for place in method_class(name).places],
        "commands": {
            f"seed {one.seed}, {one.steps} steps": study.command(one)
            for runs in plan.runs.values()
            for one in runs.get(setting, ())
        },
    }


def _training(study: Study, setting: Setting, config: Any) -> dict[str, str]:
    """What a fair comparison has alike, as text; steps aside, which the modes decide."""
    schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    return {
        "training rows": f"{study.limit(setting):,}",
        "rows a step": str(config.per_device_train_batch_size * config.gradient_accumulation_steps),
        "learning rates tried": ", ".join(study.design.rates_of(setting)),
        "optimizer": str(getattr(config.optim, "value", config.optim)),
        "schedule": f"{schedule}, warm-up {config.warmup_steps:g}",
    }


def _differs(ours: Any, theirs: Any) -> dict[str, str]:
    """The fields of the config that aren't the yardstick's."""
    from lfu.study.settings import is_lfu, lfu_fields

    mine, other = ours.to_dict(), theirs.to_dict()
    skip = {"learning_rate"} | (set() if is_lfu(ours.method) else lfu_fields())
    return {name: str(value) for name, value in mine.items() if name not in skip and value != other.get(name)}


def _runs(study: Study, plan: Plan) -> list[dict[str, Any]]:
    """Every run, once: how far it is and where it lies."""
    full = {UNTOUCHED} | {run for runs in plan.runs.values() for each in runs.values() for run in each}
    found = []
    for run in dict.fromkeys(task.run for task in plan.tasks):
        place = study.shelf(run)
        failure = place.any_failure
        wanted = "full" if run in full else "search" if any(
            task.level == "search" for task in plan.tasks if task.run == run
        ) else "timing"  # fmt: skip
        state = "failed" if failure else "finished" if place.finished(wanted) else "to do"
        notes = (place.record or place.trained or {}).get("notes", [])
        found.append({
            "label": run.label, "seed": run.seed, "learning_rate": run.learning_rate, "steps": run.steps,
            "level": wanted, "state": state, "folder": place.path.relative_to(study.folder).as_posix(),
            "error": failure["error"] if failure else "", "phase": failure["phase"] if failure else "",
            "notes": notes, "advice": (place.record or place.trained or {}).get("advice", []),
            "weights": place.record["model"]["weights"] if place.record else "",
            "model": place.record["model"] if place.record else None,
        })  # fmt: skip
    return found


def _same(study: Study) -> dict[str, Any]:
    """What all runs have in common, whatever their settings are."""
    return {
        "seeds": list(study.design.seeds),
        "training rows": len(study.split.train),
        "validation rows": len(study.split.validation),
        "test rows": len(study.split.test),
        "rows": study.split.said,
    }
