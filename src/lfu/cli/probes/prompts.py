"""Does the wording of the prompt matter? The same questions under several templates that ask the same thing.

Shows the accuracy (of the final number, or of the choice) and the reference answer's loss (NLL, the negative
log-likelihood) under each template, with their mean, standard deviation and worst case. Custom templates: a YAML file
of lines  name: "text with {question}"."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.cli import models
from lfu.cli.probes import Found, rows, template
from lfu.cli.progress import phase
from lfu.support.errors import UserError, value_errors_are_the_users
from lfu.support.flags import argument, at_least_one, option


@dataclass(kw_only=True)
class Prompts(rows.OfQuestions):
    """Scores every model under every template."""

    models: list[str] = argument("MODEL", models.HELP, nargs="+")
    templates: str | None = option(None, "YAML file of templates (default: six shipped ones)", metavar="FILE")
    template: str = template()
    metric: str = option(
        "auto", "what to judge by; auto means accuracy, unless every model is below 5 %%",
        choices=["auto", "accuracy", "nll"],
    )  # fmt: skip
    max_new_tokens: int | None = option(None, "most tokens in an answer (default: 128)", type=at_least_one)

    def measure(self) -> Found:
        from lfu.evaluation import prompts
        from lfu.evaluation.pieces import render_of

        names = models.labelled(self.models)
        asked = rows.question_rows(self.questions(), f"data {self.source}")
        task = prompts.task_of(asked)
        if task == "instruction" and self.metric == "accuracy":
            raise UserError("these answers are free text, so there is no accuracy: use --metric nll")
        if task != "word_problems" and self.max_new_tokens is not None:
            raise UserError("--max_new_tokens is for answers that end in a number: these are not written, drop it")
        with value_errors_are_the_users():
            own = self.templates and prompts.read_templates(Path(self.templates))
            templates = own or prompts.shipped_templates(task)
            for tokenizer in self.tokenizers(names).values():
                render_of(tokenizer, self.template)
        longest = self.max_new_tokens or 128

        def score(label: str, model: Any, tokenizer: Any) -> Any:
            with phase(f"{label}: {len(templates)} templates", len(templates) * len(asked)) as tick:
                return prompts.prompt_scores(
                    model, tokenizer, asked, templates, batch_size=self.batch_size, max_new_tokens=longest,
                    wrap=render_of(tokenizer, self.template), progress=tick,
                )  # fmt: skip

        described, scores = self.each(names, score)
        metrics = ["nll"] if task == "instruction" else ["accuracy", "nll"]
        first, *others = names
        spread = lambda each: {name: prompts.spread(each, name, seed=self.seed) for name in metrics}
        against = lambda each: {
            name: prompts.spread_difference(each, scores[first], name, seed=self.seed) for name in metrics
        }
        settings = {
            "data": f"{self.source} ({len(asked)})", "task": task, "template": self.template, "max_new_tokens": longest
        }  # fmt: skip
        return described, settings, {
            "metric": prompts.headline(list(scores.values()), self.metric),
            "templates": templates,
            "rows": asked,
            "scores": scores,
            "spread": {label: spread(each) for label, each in scores.items()},
            "against": first,
            "difference": {label: against(scores[label]) for label in others},
        }  # fmt: skip
