"""The study's record, as the report takes it: settings and runs, how far each is, and what was tried and chosen."""

from typing import Any

from lfu.evaluation.record import make_record
from lfu.study import halving
from lfu.study.choose import compared_with, edge_of
from lfu.study.plan import LEVELS, UNTOUCHED, Plan, Run
from lfu.study.settings import Setting, classes_of, is_lfu, lfu_fields, words_of
from lfu.study.study import Study
from lfu.study.summary import outcome


def record_of(study: Study, verb: str, command: str) -> dict[str, Any]:
    """The record of what is finished so far, of a `verb`, compare or sweep; `command` does it again."""
    plan, design, exam = study.plan(), study.design, study.exam
    finished: dict[str, Any] = {mode: {} for mode in plan.runs}
    failed: dict[str, set[str]] = {mode: set() for mode in plan.runs}
    for mode, runs in plan.runs.items():
        for run in (run for each in runs.values() for run in each):
            place = study.shelf(run)
            if place.record:
                finished[mode].setdefault(run.label, {})[run.seed] = place.record
            elif place.any_failure:
                failed[mode].add(run.label)
    results = {
        **outcome(plan, study.shelf(UNTOUCHED).record, finished, failed),
        "settings": {setting.label: _described(study, setting, plan) for setting in plan.settings},
        "search": _searched(study, plan),
        "runs": _runs(study, plan),
        "collapse": _collapse(study, plan),
        "same": {
            "seeds": list(design.seeds),
            "training rows": len(study.split.train),
            "validation rows": len(study.split.validation),
            "test rows": len(study.split.test),
            "rows": [*study.split.said, *([halving.told(plan.rungs)] if plan.rungs else [])],
        },
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
        "flags of lfu train": " ".join(words_of(study.flags)),
        "flags of LfU": " ".join(word for name in study.flags if name in lfu_fields() for word in study.flags[name]),
        "knobs": dict(study.knobs),
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


def _searched(study: Study, plan: Plan) -> dict[str, Any]:
    """label -> what was tried and chosen."""
    found = {}
    short = {(run.setting, run.learning_rate): run for runs in plan.rungs[:1] for run in runs}
    for setting in study.design.settings:
        rates = study.design.rates_of(setting)
        if len(rates) > 1:
            runs = {rate: short.get((setting, rate)) or study.design.first_run(setting, rate) for rate in rates}
            places = {rate: study.shelf(run) for rate, run in runs.items()}
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
    bisection, design = study.design.bisection, study.design
    if bisection is None:
        return None
    loss = lambda setting: study.shelf(design.first_run(setting, plan.rates[setting])).validation
    plain = bisection.setting(bisection.low).yardstick
    holds, collapses = bisection.bracket(plan.collapsed)
    return {
        "name": bisection.name, "method": bisection.method, "low": bisection.low, "high": bisection.high,
        "holds": holds, "collapses": collapses, "untouched": study.shelf(UNTOUCHED).validation,
        "sft": loss(plain) if plain in plan.rates else None,
        "tried": {
            f"{value:g}": {"loss": loss(bisection.setting(value)), "collapsed": plan.collapsed[value]}
            for value in sorted(plan.collapsed)
        },
    }  # fmt: skip


def _described(study: Study, setting: Setting, plan: Plan) -> dict[str, Any]:
    """What makes this setting differ from plain SFT, with the command that trains it."""
    methods = classes_of(setting.method).values()
    rate = plan.rates.get(setting, study.design.rates_of(setting)[0])
    run = study.design.first_run(setting, rate)
    config = study.configs(run)[0]
    ours, theirs = config.to_dict(), study.configs(Run(setting.yardstick, run.seed, rate, run.steps))[0].to_dict()
    skip = {"learning_rate"} | (set() if is_lfu(setting.method) else lfu_fields())
    schedule = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    return {
        "method": setting.method,
        "values": setting.values,
        "yardstick": setting.yardstick.label,
        "against": (compared_with(setting, plan.settings) or UNTOUCHED).label,
        "what": [method.summary for method in methods],
        "differs": {name: str(value) for name, value in ours.items() if name not in skip and value != theirs.get(name)},
        # what a fair comparison has alike; steps aside, which the modes decide
        "training": {
            "training rows": f"{study.limit(setting):,}",
            "rows per step": str(config.per_device_train_batch_size * config.gradient_accumulation_steps),
            "learning rates tried": ", ".join(study.design.rates_of(setting)),
            "optimizer": str(getattr(config.optim, "value", config.optim)),
            "schedule": f"{schedule}, warm-up {config.warmup_steps:g}",
        },
        "learning_rate": plan.rates.get(setting),
        "steps": {mode: runs[setting][0].steps for mode, runs in plan.runs.items() if setting in runs},
        "places": [place for method in methods for place in method.places],
        "commands": {
            f"seed {one.seed}, {one.steps} steps": study.command(one)
            for runs in plan.runs.values()
            for one in runs.get(setting, ())
        },
    }


def _runs(study: Study, plan: Plan) -> list[dict[str, Any]]:
    """Every run, once: how far it is wanted and is, where it lies, what went wrong, and what was said."""
    full = {UNTOUCHED} | {run for runs in plan.runs.values() for each in runs.values() for run in each}
    found = []
    for run in dict.fromkeys(task.run for task in plan.tasks):
        place = study.shelf(run)
        failure, told = place.any_failure or {}, place.record or place.trained or {}
        levels = [task.level for task in plan.tasks if task.run == run]
        wanted = "full" if run in full else max(levels, key=LEVELS.index)
        found.append(run.described | {
            "level": wanted, "state": "failed" if failure else "finished" if place.finished(wanted) else "to do",
            "folder": place.path.relative_to(study.folder).as_posix(),
            "error": failure.get("error", ""), "phase": failure.get("phase", ""),
            "notes": told.get("notes", []), "advice": told.get("advice", []),
            "weights": place.record["model"]["weights"] if place.record else "",
        })  # fmt: skip
    return found
