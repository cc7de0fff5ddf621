"""Does the wording of the prompt matter? The same questions under several templates that ask the same thing.

Accuracy (the final number, or the choice) and the reference answer's NLL under each template; their mean, standard
deviation over the templates, and worst case. Custom templates: a YAML file of lines  name: "text with {question}"."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lfu.cli.probes import models, rows
from lfu.cli.probes.progress import phase
from lfu.support.errors import value_errors_are_the_users


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The probe's own flags."""
    models.add_models(parser)
    rows.add_data(parser, "questions with answers or choices (default: 100 built-in word problems)")
    parser.add_argument("--templates", metavar="FILE", help="YAML file of templates (default: six shipped ones)")
    rows.add_template(parser)
    parser.add_argument(
        "--metric", default="auto", choices=["auto", "accuracy", "nll"],
        help="what to judge by; auto means accuracy, unless every model is below 5 %%",
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=int, default=128, metavar="N",
        help="most tokens in a written answer (default: 128)",
    )  # fmt: skip


def measure(given: argparse.Namespace, command: str) -> dict[str, Any]:
    """Scores every model under every template, one model in memory at a time.

    Raises:
        UserError: models, data or templates that can't be used; a metric that the data hasn't got.
    """
    from lfu.evaluation import prompts
    from lfu.evaluation.record import make_record

    names = models.labelled(given.models)
    asked = rows.questions(given)
    task = prompts.task_of(asked)
    with value_errors_are_the_users():
        templates = _templates(given, task)
        for tokenizer in models.tokenizers(names, given).values():
            prompts.render_of(tokenizer, given.template)

    def score(label: str, model: Any, tokenizer: Any) -> Any:
        with phase(f"{label}: {len(templates)} templates", len(templates) * len(asked)) as tick:
            return prompts.prompt_scores(
                model, tokenizer, asked, templates, batch_size=given.batch_size, max_new_tokens=given.max_new_tokens,
                wrap=prompts.render_of(tokenizer, given.template), progress=tick,
            )  # fmt: skip

    described, scores = models.each_model(names, given, score)
    metrics = ["nll"] if task == "instruction" else ["accuracy", "nll"]
    first = next(iter(names))
    spread = lambda each: {name: prompts.spread(each, name, seed=given.seed) for name in metrics}
    against = lambda each: {
        name: prompts.spread_difference(each, scores[first], name, seed=given.seed) for name in metrics
    }
    return make_record(
        "prompts",
        models=described,
        settings={
            "data": f"{given.data or 'built-in word problems'} ({len(asked)})", "task": task,
            "template": given.template, "max_new_tokens": given.max_new_tokens,
        },
        results={
            "metric": prompts.headline(list(scores.values()), given.metric),
            "templates": templates,
            "rows": asked,
            "scores": scores,
            "spread": {label: spread(each) for label, each in scores.items()},
            "against": first,
            "difference": {label: against(each) for label, each in scores.items() if label != first},
        },
        command=command,
        seed=given.seed,
    )  # fmt: skip


def _templates(given: argparse.Namespace, task: str) -> dict[str, str]:
    """The templates asked for; ValueError where a flag doesn't go with the task."""
    from lfu.evaluation import prompts

    if task == "instruction" and given.metric == "accuracy":
        raise ValueError("these answers are free text, so there is no accuracy: use --metric nll")
    if given.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, got {given.max_new_tokens}")
    return prompts.read_templates(Path(given.templates)) if given.templates else prompts.shipped_templates(task)
