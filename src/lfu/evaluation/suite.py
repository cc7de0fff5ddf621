"""Several models on the tasks of several categories: averages, the paper's rank, what was gained and lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfu.evaluation import cache
from lfu.evaluation.categories import Categories, Entry, load, main_metric
from lfu.evaluation.forgetting import forgetting
from lfu.evaluation.harness import Settings, TaskFailed, TaskResult, run_task
from lfu.evaluation.intervals import Interval, mean_interval, paired_difference
from lfu.evaluation.ranks import average_ranks
from lfu.evaluation.record import describe_model
from lfu.evaluation.shares import wilson
from lfu.evaluation.tasks import Missing, Runnable, find
from lfu.support.errors import UserError

if TYPE_CHECKING:
    from lfu.support.annotations import Model, Tokenizer

LISTED = 50  # lost items of a task that are put into the results for reading


@dataclass(frozen=True)
class Plan:
    """What is to be run: categories, the tasks that can be, those that can't."""

    categories: Categories
    tasks: Mapping[str, Runnable]
    missing: Sequence[Missing]


@dataclass
class Outcome:
    """What one model did.

    Attributes:
        description: `describe_model`'s.
        results: task -> result.
        failed: task -> why this model has none.
        cached: tasks whose results an earlier run left.
    """

    description: dict[str, Any]
    results: dict[str, TaskResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)


class Watch:
    """Told what happens; does nothing. A command line overrides it."""

    def starts(self, label: str, task: str) -> None:
        """A task starts on a model."""

    def advances(self, done: int, total: int) -> None:
        """Requests of this task that are done."""

    def ends(self, label: str, task: str, how: str, seconds: float) -> None:
        """A task is finished: `how` is a line to read."""


def plan(
    categories: Categories | None = None,
    *,
    data_dir: Path | None = None,
    allow_hub: bool = False,
    num_fewshot: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Loads the items of all tasks. See `lfu.evaluation.tasks.find` for the arguments.

    Raises:
        UserError: an unknown task, a broken file, or no task that can be run.
    """
    categories = categories or load("paper")
    found, missing = find(
        categories.tasks, data_dir=data_dir, allow_hub=allow_hub, num_fewshot=num_fewshot, say=say
    )  # fmt: skip
    if not found:
        more = f"; {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"no task can be run ({missing[0].name}: {missing[0].why}{more}): give --data_dir with the tasks' files, "
            "or use a machine with a network"
        )
    return Plan(categories, found, missing)


def evaluate(
    models: Mapping[str, tuple[Model, Tokenizer]],
    plan: Plan,
    *,
    settings: Settings | None = None,
    base: str | None = None,
    use_cache: bool = True,
    watch: Watch | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores models in memory on each task.

    Args:
        models: label -> (model, tokenizer).
        plan: what to run.
        base: the label of the untouched model, if it is among them: forgetting is counted against it.
        use_cache: take finished tasks from the cache, and keep those that finish.

    Returns:
        (descriptions by label, `assemble`'s results): what `make_record` takes as models and results.

    Raises:
        UserError: as `score`; a base that isn't among the models.
    """
    if base is not None and base not in models:
        raise UserError(f"base {base!r} is not among the models ({', '.join(models)})")
    settings = settings or Settings()
    outcomes = {
        label: score(label, model, tokenizer, plan, settings=settings, use_cache=use_cache, watch=watch)
        for label, (model, tokenizer) in models.items()
    }
    results = assemble(plan, outcomes, base=base, seed=settings.seed)
    return {label: outcome.description for label, outcome in outcomes.items()}, results


def score(
    label: str,
    model: Model,
    tokenizer: Tokenizer,
    plan: Plan,
    *,
    settings: Settings | None = None,
    name: str = "",
    use_cache: bool = True,
    watch: Watch | None = None,
) -> Outcome:
    """One model on each task.

    Args:
        label: what `watch` is told.
        name: the model's name in its description; by default the label.

    Raises:
        UserError: as `run_task`; the cache folder can't be written.
    """
    settings = settings or Settings()
    outcome = Outcome(describe_model(name or label, model))
    ours = cache.model_fingerprint(outcome.description["weights"], model, tokenizer) if use_cache else ""
    for task in plan.tasks.values():
        key = None
        if use_cache:
            theirs = cache.task_fingerprint(task.leaves, limit=settings.limit, num_fewshot=task.num_fewshot)
            key = cache.key(ours, theirs, asdict(settings))
        _one(outcome, label, model, tokenizer, task, settings, key, watch or Watch())
    return outcome


def _one(
    outcome: Outcome, label: str, model: Model, tokenizer: Tokenizer, task: Runnable, settings: Settings,
    key: str | None, watch: Watch,
) -> None:  # fmt: skip
    """One model on one task, from the cache if it is there."""
    start = time.monotonic()
    watch.starts(label, task.name)
    kept = cache.load(key) if key else None
    if kept is not None:
        result = TaskResult.from_json(kept)
        outcome.cached.append(task.name)
    else:
        try:
            result = run_task(model, tokenizer, task, settings, progress=watch.advances)
        except TaskFailed as error:
            outcome.failed[task.name] = str(error)
            watch.ends(label, task.name, f"failed: {error}", time.monotonic() - start)
            return
        if key:
            cache.save(key, result.to_json())
    outcome.results[task.name] = result
    many = "" if len(result.texts) == 1 else "s"
    how = f"{len(result.texts)} item{many}{', from the cache' if kept is not None else ''}"
    watch.ends(label, task.name, how, time.monotonic() - start)


# --- from outcomes to results ----------------------------------------------------------------------------------------


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
    missing: list[dict[str, Any]] = [{"task": one.name, "why": one.why, "label": None} for one in plan.missing]
    missing += [
        {"task": task, "why": why, "label": label}
        for label, outcome in outcomes.items()
        for task, why in outcome.failed.items()
    ]
    tasks: dict[str, Any] = {}
    categories: dict[str, Any] = {}
    for category, entries in plan.categories.entries.items():
        whole = []
        for entry in entries:
            for name in entry.tasks:
                if name in plan.tasks and (row := _task(plan, name, category, entry, outcomes, missing, seed)):
                    tasks[name] = row
            if all(name in tasks and len(tasks[name]["scores"]) == len(outcomes) for name in entry.tasks):
                whole.append(entry)
        left_out = plan.categories.left_out.get(category, ())
        categories[category] = _category(entries, whole, left_out, tasks, list(outcomes))
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


def _task(
    plan: Plan, name: str, category: str, entry: Entry, outcomes: Mapping[str, Outcome], missing: list[dict[str, Any]],
    seed: int,
) -> dict[str, Any] | None:  # fmt: skip
    """One task's part of the results; None, and a line in `missing`, where no model has a metric that can be used."""
    have = {label: outcome.results[name] for label, outcome in outcomes.items() if name in outcome.results}
    if not have:
        return None
    first = next(iter(have.values()))
    try:
        metric = main_metric(first.scores, entry.metric)
    except ValueError as error:
        missing.append({"task": name, "why": str(error), "label": None})
        return None
    return {
        "category": category,
        "entry": entry.name,
        "metric": metric,
        "items": len(first.texts),
        "fewshot": first.num_fewshot,
        "source": plan.tasks[name].source,
        "scores": {label: _interval(result, metric, seed) for label, result in have.items()},
        "correct": {label: _values(result.items[metric]) for label, result in have.items()},
        "all": {label: result.scores for label, result in have.items()},
        "truncated": {label: result.truncated for label, result in have.items()},
    }


def _interval(result: TaskResult, metric: str, seed: int) -> dict[str, float]:
    """Value and 95 % interval: Wilson's for right or wrong, else the bootstrap over the items.

    The bootstrap has no width where all items are alike, as with 0 of 20 right.
    """
    items = result.items[metric]
    if _binary(items) and len(set(result.weights)) == 1:
        interval = wilson(int(sum(items)), len(items))
    else:
        interval = mean_interval(items, result.weights, seed=seed)
    low, high = interval.low, interval.high
    return {"value": result.scores[metric], "low": low, "high": high}


def _values(items: Sequence[float]) -> list[bool] | list[float]:
    """Right or wrong where the metric says no more than that."""
    return [bool(value) for value in items] if _binary(items) else list(items)


def _binary(items: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in items)


def _category(
    entries: Sequence[Entry], whole: Sequence[Entry], left_out: Sequence[str], tasks: Mapping[str, Any],
    labels: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
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
    changes: dict[str, Any] = {}
    lost: dict[str, Any] = {}
    for label, outcome in outcomes.items():
        if label == base:
            continue
        changes[label], lost[label] = {}, {}
        for name, row in tasks.items():
            if not {label, base} <= row["scores"].keys():
                continue
            one, two = outcomes[base].results[name], outcome.results[name]
            changes[label][name] = _change(one, two, row["metric"], seed)
            indices = _lost(one, two, row["metric"])
            if indices:
                shown = [_compared(one, two, index, row["metric"]) for index in indices[:LISTED]]
                lost[label][name] = {"count": len(indices), "items": shown}
    return changes, lost


def _change(before: TaskResult, after: TaskResult, metric: str, seed: int) -> dict[str, Any]:
    old, new = before.items[metric], after.items[metric]
    if _binary(old) and _binary(new) and len(set(before.weights)) == 1:
        found = asdict(forgetting([bool(x) for x in old], [bool(x) for x in new], seed=seed))
        return found | {"net": _plain(found["net"])}
    net = paired_difference(new, old, before.weights, seed=seed)
    return {"items": len(old), "before": before.scores[metric], "after": after.scores[metric], "net": _plain(net)}


def _plain(interval: Interval | Mapping[str, float]) -> dict[str, float]:
    values = interval if isinstance(interval, Mapping) else asdict(interval)
    return {name: values[name] for name in ("value", "low", "high")}


def _lost(before: TaskResult, after: TaskResult, metric: str) -> list[int]:
    """Items that were right before and are wrong after; none where items are not right or wrong."""
    old, new = before.items[metric], after.items[metric]
    return [i for i, (a, b) in enumerate(zip(old, new)) if a and not b] if _binary(old) and _binary(new) else []


def _compared(before: TaskResult, after: TaskResult, index: int, metric: str) -> dict[str, Any]:
    text = before.texts[index]
    return {
        "item": index,
        "question": text["question"],
        "expected": text["expected"],
        "before": given(text, metric),
        "after": given(after.texts[index], metric),
    }


def given(text: Mapping[str, Any], metric: str) -> str:
    """What the model gave as its answer, by the metric: the generated text, or the choice it found likeliest."""
    if "generated" in text:
        return text["generated"]
    if "choices" not in text:
        return "the expected continuation" if text["greedy"] else "another continuation"
    values, choices = text["loglik"], text["choices"]
    if metric.startswith("acc_norm"):
        values = [value / max(1, len(choice)) for value, choice in zip(values, choices)]
    return choices[max(range(len(values)), key=values.__getitem__)]
