"""The study's record, as the report takes it."""

from __future__ import annotations

from typing import Any

from lfu.evaluation.record import make_record
from lfu.study.description import collapse_of, described, runs_of, same_for_all, searched
from lfu.study.plan import UNTOUCHED
from lfu.study.study import Study
from lfu.study.summary import outcome


def record_of(study: Study, verb: str, command: str) -> dict[str, Any]:
    """The record of everything that is finished so far.

    Args:
        verb: `compare` or `sweep`.
        command: what to type to do it again.
    """
    plan, design, exam = study.plan(), study.design, study.exam
    untouched = study.shelf(UNTOUCHED).record
    finished: dict[str, Any] = {}
    failed: dict[str, Any] = {}
    for mode, runs in plan.runs.items():
        found = {s.label: {run.seed: study.shelf(run).record for run in each} for s, each in runs.items()}
        done = {label: {seed: one for seed, one in each.items() if one} for label, each in found.items()}
        finished[mode] = {label: each for label, each in done.items() if each}
        failed[mode] = {run.label for each in runs.values() for run in each if study.shelf(run).any_failure}
    results = {
        **outcome(plan, untouched, finished, failed),
        "settings": {setting.label: described(study, setting, plan) for setting in plan.settings},
        "search": searched(study, plan),
        "runs": runs_of(study, plan),
        "collapse": collapse_of(study, plan),
        "same": same_for_all(study, plan),
        "left_out": dict(exam.left_out),
        "whole": plan.whole and not study.open_tasks(plan),
    }
    settings = {
        "verb": verb,
        "model": str(study.configs(UNTOUCHED)[1].model_name_or_path),
        "settings": [setting.label for setting in design.settings],
        "seeds": list(design.seeds),
        "learning rates": list(design.rates),
        "equal": list(design.equal),
        "measures": list(exam.measures),
        "flags of lfu train": " ".join(study.flags.training),
        "flags of LfU": " ".join(study.flags.own),
        "knobs": dict(study.flags.knobs),
        "match rows": exam.match_rows,
        "reworded and disturbed rows": exam.robust_rows,
        "longest written answer, tokens": exam.max_new_tokens,
        "kept": {each.name: len(each.rows) for each in exam.kept},
        "trained with": study.environment,
        "checkpoint every": study.save_steps or "none: a training that is killed starts anew",
    }
    models: dict[str, Any] = {}
    for task in plan.tasks:
        if record := study.shelf(task.run).record:
            models.setdefault(task.run.label, record["model"])
    return make_record(
        "compare", models=models, settings=settings, results=results, command=command, seed=design.seeds[0]
    )
