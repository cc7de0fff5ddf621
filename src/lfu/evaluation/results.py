"""From what models did on tasks to the results of a record: averages by category, ranks, what was gained and lost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lfu.evaluation.categories import Categories, Entry, main_metric
from lfu.evaluation.forgetting import forgetting
from lfu.evaluation.harness import TaskResult
from lfu.evaluation.intervals import mean_interval, paired_difference, wilson
from lfu.evaluation.ranks import average_ranks
from lfu.evaluation.score import likeliest
from lfu.evaluation.tasks import Runnable

LISTED = 50  # lost items of a task that are put into the results for reading


@dataclass(frozen=True)
class Plan:
    """What is to be run: categories, the tasks that can be, those that can't."""

    categories: Categories
    tasks: Mapping[str, Runnable]
    missing: Mapping[str, str]  # task -> why


@dataclass
class Outcome:
    """What one model did, task by task."""

    description: dict[str, Any]  # `describe_model`'s
    results: dict[str, TaskResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # task -> why this model has no result
    cached: list[str] = field(default_factory=list)  # tasks whose results an earlier run left


def assemble(plan: Plan, outcomes: Mapping[str, Outcome], *, base: str | None = None, seed: int = 0) -> dict[str, Any]:
    """The results of a record, JSON-ready. Scores are shares, 0 to 1.

    Nothing is averaged away: an entry of a category counts only where EVERY model has all of its tasks, so that all
    averages are over the same; what is missing is listed with its reason.

    Returns:
        `tasks`: task -> category, entry, metric, items, fewshot, source, scores (label -> value, low, high), correct
        (label -> one value per item), all (label -> every metric of the harness), truncated (label -> prompts cut).
        `categories`: category -> tasks (entries averaged over), missing (entries that not every model has), not_asked
        (entries that `select` took out), parts (entry -> tasks), complete, scores (label -> value or None).
        `missing`: task, why, label (None: it is missing for all).
        `ranks`: label -> the paper's average rank among the models other than the base, or None; `ranked_over`.
        `forgetting`, `lost`: see `against_base`; `base`: its label or None.
    """
    missing = [{"task": task, "why": why, "label": None} for task, why in plan.missing.items()]
    for label, outcome in outcomes.items():
        missing += [{"task": task, "why": why, "label": label} for task, why in outcome.failed.items()]
    tasks: dict[str, Any] = {}
    categories: dict[str, Any] = {}
    for category, entries in plan.categories.entries.items():
        for entry in entries:
            for name in entry.tasks:
                if have := {label: one.results[name] for label, one in outcomes.items() if name in one.results}:
                    try:
                        tasks[name] = _task(category, entry, plan.tasks[name].source, have, seed)
                    except ValueError as error:  # no metric that can be used
                        missing.append({"task": name, "why": str(error), "label": None})
        left_out = plan.categories.left_out.get(category, ())
        categories[category] = _category(entries, left_out, tasks, list(outcomes))
    ranks, ranked_over = _ranks(categories, [label for label in outcomes if label != base])
    changes, lost = against_base(tasks, outcomes, base, seed) if base else ({}, {})
    return {
        "about": plan.categories.about,
        "tasks": tasks,
        "categories": categories,
        "missing": missing,
        "ranks": ranks,
        "ranked_over": ranked_over,
        "base": base,
        "forgetting": changes,
        "lost": lost,
        "cached": {label: outcome.cached for label, outcome in outcomes.items()},
    }


def _task(category: str, entry: Entry, source: str, have: Mapping[str, TaskResult], seed: int) -> dict[str, Any]:
    """One task's part of the results. Raises ValueError where its metric is not there."""
    first = next(iter(have.values()))
    share = lambda metric: all(0 <= value <= 1 for one in have.values() for value in one.items.get(metric, [math.nan]))
    metric = main_metric(list(filter(share, first.scores)), entry.metric)
    items = {label: result.items[metric] for label, result in have.items()}
    return {
        "category": category,
        "entry": entry.name,
        "metric": metric,
        "items": len(first.texts),
        "fewshot": first.num_fewshot,
        "source": source,
        "scores": {label: _score(result, metric, seed) for label, result in have.items()},
        "correct": {label: _right(of) if _binary(of) else of for label, of in items.items()},
        "all": {label: result.scores for label, result in have.items()},
        "truncated": {label: result.truncated for label, result in have.items()},
    }


def _score(result: TaskResult, metric: str, seed: int) -> dict[str, float]:
    """Value and 95 % interval: Wilson's for right or wrong (a bootstrap of 0 in 20 has no width), else bootstrap's."""
    items = result.items[metric]
    counts = _counts(result, metric)
    interval = wilson(int(sum(items)), len(items)) if counts else mean_interval(items, result.weights, seed=seed)
    return asdict(interval) | {"value": result.scores[metric]}


def _binary(items: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in items)


def _right(items: Sequence[float]) -> list[bool]:
    return [bool(value) for value in items]


def _counts(result: TaskResult, metric: str) -> bool:
    """Whether the score is the share of the items that are right."""
    return _binary(result.items[metric]) and len(set(result.weights)) == 1


def _category(
    entries: Sequence[Entry], left_out: Sequence[str], tasks: Mapping[str, Any], labels: Sequence[str]
) -> dict[str, Any]:
    has_all = lambda name: name in tasks and len(tasks[name]["scores"]) == len(labels)
    whole = [entry for entry in entries if all(map(has_all, entry.tasks))]

    def value(entry: Entry, label: str) -> float:
        return math.fsum(tasks[name]["scores"][label]["value"] for name in entry.tasks) / len(entry.tasks)

    return {
        "tasks": [entry.name for entry in whole],
        "missing": [entry.name for entry in entries if entry not in whole],
        "parts": {entry.name: list(entry.tasks) for entry in entries if entry.tasks != (entry.name,)},
        "not_asked": list(left_out),
        "complete": len(whole) == len(entries) and not left_out,
        "scores": {
            label: math.fsum(value(entry, label) for entry in whole) / len(whole) if whole else None for label in labels
        },
    }


def _ranks(
    categories: Mapping[str, Any], labels: Sequence[str]
) -> tuple[dict[str, float] | None, dict[str, list[str]]]:
    """The paper's average rank over what all models have, and what that is; None for fewer than two models."""
    over = {name: category["tasks"] for name, category in categories.items() if category["tasks"]}
    if len(labels) < 2 or not over:
        return None, {}
    per_cent = {name: {label: 100 * categories[name]["scores"][label] for label in labels} for name in over}
    return average_ranks(per_cent), over


def against_base(
    tasks: Mapping[str, Any], outcomes: Mapping[str, Outcome], base: str, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(forgetting, lost items) of every model but the base, task by task.

    Returns:
        label -> task -> `items`, `before`, `after` (shares), `net` (after - before: value, low, high, paired), and
        where items are right or wrong `kept`, `lost`, `gained`, `never`, `mcnemar_p`; label -> task -> `count` of
        the lost items and the first `LISTED` of them, with what was asked, expected, and given by both models.
    """
    changes: dict[str, Any] = {label: {} for label in outcomes if label != base}
    lost: dict[str, Any] = {label: {} for label in changes}
    for label in changes:
        for name, row in tasks.items():
            if {label, base} <= row["scores"].keys():
                before, after = (outcomes[one].results[name] for one in (base, label))
                changes[label][name] = _change(before, after, row["metric"], seed)
                if found := _lost(before, after, row["metric"]):
                    lost[label][name] = {"count": len(found), "items": found[:LISTED]}
    return changes, lost


def _change(before: TaskResult, after: TaskResult, metric: str, seed: int) -> dict[str, Any]:
    old, new = before.items[metric], after.items[metric]
    if _counts(before, metric) and _binary(new):
        return asdict(forgetting(_right(old), _right(new), seed=seed))
    net = paired_difference(new, old, before.weights, seed=seed)
    return {"items": len(old), "before": before.scores[metric], "after": after.scores[metric], "net": asdict(net)}


def _lost(before: TaskResult, after: TaskResult, metric: str) -> list[dict[str, Any]]:
    """Items that were right before and are wrong after; none where items are not right or wrong."""
    old, new = before.items[metric], after.items[metric]
    if not (_binary(old) and _binary(new)):
        return []
    return [
        {"item": index, "question": asked["question"], "expected": asked["expected"],
         "before": given(asked, metric), "after": given(after.texts[index], metric)}
        for index, asked in enumerate(before.texts)
        if old[index] and not new[index]
    ]  # fmt: skip


def given(text: Mapping[str, Any], metric: str) -> str:
    """What the model gave as its answer, by the metric: the generated text, or the choice it found likeliest."""
    if "generated" in text:
        return text["generated"]
    if "choices" not in text:
        return "the expected continuation" if text["greedy"] else "another continuation"
    choices = text["choices"]
    return choices[likeliest(text["loglik"], choices if metric.startswith("acc_norm") else None)]
