"""The study's record, as the report takes it."""

from __future__ import annotations

from typing import Any

from lfu.evaluation.record import make_record
from lfu.study.plan import UNTOUCHED
from lfu.study.study import Study
from lfu.study.summary import results_of


def record_of(study: Study, verb: str, command: str) -> dict[str, Any]:
    """The record of everything that is finished so far.

    Args:
        verb: `compare` or `sweep`.
        command: what to type to do it again.
    """
    plan = study.plan()
    results = results_of(study, plan)
    _, model = study.configs(UNTOUCHED)
    models: dict[str, Any] = {}
    for run in results["runs"]:
        if run["model"] is not None:
            models.setdefault(run["label"], run["model"])
        del run["model"]
    design = study.design
    settings = {
        "verb": verb,
        "model": str(model.model_name_or_path),
        "settings": [setting.label for setting in design.settings],
        "seeds": list(design.seeds),
        "learning rates": list(design.rates),
        "equal": list(design.equal),
        "measures": list(study.exam.measures),
        "flags of lfu train": " ".join(study.flags.training),
        "flags of LfU": " ".join(study.flags.own),
        "knobs": dict(study.flags.knobs),
        "match rows": study.exam.match_rows,
        "reworded and disturbed rows": study.exam.robust_rows,
        "longest written answer, tokens": study.exam.max_new_tokens,
        "kept": {each.name: len(each.rows) for each in study.exam.kept},
        "trained with": study.environment,
        "checkpoint every": study.save_steps or "none: a training that is killed starts anew",
    }
    return make_record(
        "compare", models=models, settings=settings, results=results, command=command, seed=design.seeds[0]
    )
