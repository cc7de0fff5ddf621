"""Runs several models on the tasks of several categories, and keeps what is finished."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lfu.evaluation import cache
from lfu.evaluation.categories import Categories, load
from lfu.evaluation.harness import Settings, TaskFailed, TaskResult, run_task
from lfu.evaluation.record import describe_model
from lfu.evaluation.results import Outcome, Plan, assemble
from lfu.evaluation.tasks import find
from lfu.support.annotations import Model, Tokenizer
from lfu.support.errors import UserError
from lfu.support.words import counted


class Watch:
    """Is told what happens, and does nothing: a command line gives another object with these methods."""

    def starts(self, label: str, task: str) -> None:
        """A task starts on a model."""

    def advances(self, done: int, total: int) -> None:
        """Requests of this task that are done."""

    def ends(self, label: str, task: str, how: str, seconds: float) -> None:
        """A task is finished: `how` is a line to read."""


def plan(categories: Categories | None = None, **options: Any) -> Plan:
    """Loads the items of all tasks, by default the paper's; `options` are the keyword arguments of `tasks.find`.

    Raises UserError: an unknown task, a broken file, or no task that can be run.
    """
    categories = categories or load("paper")
    found, missing = find(categories.tasks, **options)
    if not found:
        name, why = next(iter(missing.items()))
        more = f"; {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"no task can be run ({name}: {why}{more}): give --data_dir with the tasks' files, "
            "or use a machine with a network"
        )
    return Plan(categories, found, missing)


def evaluate(
    models: Mapping[str, tuple[Model, Tokenizer]], plan: Plan, *, settings: Settings | None = None,
    base: str | None = None, use_cache: bool = True, watch: Watch | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Scores models in memory (label -> model and tokenizer) on each task of a plan.

    `base` is the label of the untouched model, if it is among them: forgetting is counted against it. With `use_cache`
    finished tasks are taken from the cache, and those that finish are kept.

    Returns (descriptions by label, `assemble`'s results): what `make_record` takes as models and results.

    Raises UserError: as `score`; a base that isn't among the models.
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
    label: str, model: Model, tokenizer: Tokenizer, plan: Plan, *, settings: Settings | None = None, name: str = "",
    use_cache: bool = True, watch: Watch | None = None,
) -> Outcome:  # fmt: skip
    """One model on each task; `name` is the model's in its description, by default the label.

    Raises UserError: as `run_task`; the cache folder can't be written.
    """
    settings, watch = settings or Settings(), watch or Watch()
    outcome = Outcome(describe_model(name or label, model))
    ours = cache.model_fingerprint(outcome.description["weights"], model, tokenizer) if use_cache else ""
    for task in plan.tasks.values():
        kept = key = None
        if use_cache:
            theirs = cache.task_fingerprint(task.leaves, limit=settings.limit, num_fewshot=task.num_fewshot)
            key = cache.key(ours, theirs, asdict(settings))
            kept = cache.load(key)
        start = time.monotonic()
        watch.starts(label, task.name)
        try:
            result = TaskResult(**kept) if kept else run_task(model, tokenizer, task, settings, progress=watch.advances)
        except TaskFailed as error:
            outcome.failed[task.name] = str(error)
            how = f"failed: {error}"
        else:
            outcome.results[task.name] = result
            items = len(result.texts)
            how = f"{counted(items, 'item')}{', from the cache' * bool(kept)}"
            if kept:
                outcome.cached.append(task.name)
            elif key:
                cache.save(key, asdict(result))
        watch.ends(label, task.name, how, time.monotonic() - start)
    return outcome
