"""What the settings and the runs of a study were, how far each run is, and what was tried to choose by."""

from __future__ import annotations

from typing import Any

from lfu.methods import method_class
from lfu.study import halving
from lfu.study.choose import compared_with, edge_of
from lfu.study.plan import LEVELS, UNTOUCHED, Plan, Run
from lfu.study.settings import Setting, is_lfu, lfu_fields
from lfu.study.study import Study


def searched(study: Study, plan: Plan) -> dict[str, Any]:
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


def collapse_of(study: Study, plan: Plan) -> dict[str, Any] | None:
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


def described(study: Study, setting: Setting, plan: Plan) -> dict[str, Any]:
    """What makes this setting differ from plain SFT, with the command that trains it."""
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
        "rows per step": str(config.per_device_train_batch_size * config.gradient_accumulation_steps),
        "learning rates tried": ", ".join(study.design.rates_of(setting)),
        "optimizer": str(getattr(config.optim, "value", config.optim)),
        "schedule": f"{schedule}, warm-up {config.warmup_steps:g}",
    }


def _differs(ours: Any, theirs: Any) -> dict[str, str]:
    """The fields of the config that aren't the yardstick's."""
    mine, other = ours.to_dict(), theirs.to_dict()
    skip = {"learning_rate"} | (set() if is_lfu(ours.method) else lfu_fields())
    return {name: str(value) for name, value in mine.items() if name not in skip and value != other.get(name)}


def runs_of(study: Study, plan: Plan) -> list[dict[str, Any]]:
    """Every run, once: how far it is wanted and is, where it lies, what went wrong, and what was said."""
    full = {UNTOUCHED} | {run for runs in plan.runs.values() for each in runs.values() for run in each}
    found = []
    for run in dict.fromkeys(task.run for task in plan.tasks):
        place = study.shelf(run)
        failure, told = place.any_failure or {}, place.record or place.trained or {}
        levels = [task.level for task in plan.tasks if task.run == run]
        wanted = "full" if run in full else max(levels, key=LEVELS.index)
        found.append({
            "label": run.label, "seed": run.seed, "learning_rate": run.learning_rate, "steps": run.steps,
            "level": wanted, "state": "failed" if failure else "finished" if place.finished(wanted) else "to do",
            "folder": place.path.relative_to(study.folder).as_posix(),
            "error": failure.get("error", ""), "phase": failure.get("phase", ""),
            "notes": told.get("notes", []), "advice": told.get("advice", []),
            "weights": place.record["model"]["weights"] if place.record else "",
        })  # fmt: skip
    return found


def same_for_all(study: Study, plan: Plan) -> dict[str, Any]:
    """What all runs have in common, whatever their settings are."""
    return {
        "seeds": list(study.design.seeds),
        "training rows": len(study.split.train),
        "validation rows": len(study.split.validation),
        "test rows": len(study.split.test),
        "rows": [*study.split.said, *([halving.told(plan.rungs)] if plan.rungs else [])],
    }
