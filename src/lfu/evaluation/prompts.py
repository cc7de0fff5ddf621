"""Does a model still do the task when the prompt is worded differently? Scores under several prompt templates."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lfu.data.turns import MARK
from lfu.evaluation.batching import Progress, tick
from lfu.evaluation.intervals import Interval, percentiles, resampled
from lfu.evaluation.pieces import Asked, Render, chat_pair
from lfu.evaluation.score import answer_nll, exact_match, final_number, likeliest
from lfu.support.annotations import Model, Tokenizer
from lfu.support.choices import one_of
from lfu.support.files import read_yaml

SHIPPED = Path(__file__).with_suffix(".yaml")
TASKS = ("word_problems", "multiple_choice", "instruction")
METRICS = ("auto", "accuracy", "nll")
TOO_LOW = 0.05  # accuracy below which it can't tell templates apart
FIELDS = {"question", "choices"}
RESAMPLES = 10_000


@dataclass(frozen=True)
class TemplateScores:
    """One model's scores under one template, per row."""

    nll: list[float]  # of the reference answer, summed over its tokens (nats)
    tokens: list[int]
    correct: list[bool] | None  # is the model's answer right? None where there is no right one to compare with
    text: list[str]  # what it wrote (word problems) or chose (multiple choice); empty for instructions


@dataclass(frozen=True)
class Spread:
    """One metric over the templates: mean, sample standard deviation, worst template, with bootstrap intervals.

    The intervals draw rows, the same for all templates; the templates themselves are taken as given. With few rows the
    standard deviation has the noise of the rows in it, and its interval with it.
    """

    metric: str
    templates: dict[str, float]
    mean: Interval
    std: Interval
    worst: Interval
    worst_template: str


def shipped_templates(task: str) -> dict[str, str]:
    """Name -> template of one of `TASKS`, as shipped. Raises ValueError: no such task."""
    one_of("task", task, TASKS)
    return read_yaml(SHIPPED, "templates")[task]


def read_templates(path: Path) -> dict[str, str]:
    """Name -> template from a YAML file of the user's: `name: "text with {question}"`, two or more.

    Raises UserError: it can't be read or isn't YAML. ValueError: no such lines; no {question} in one, or other fields.
    """
    found = read_yaml(path, "templates")
    if not isinstance(found, dict):
        raise ValueError(f'templates {path}: must hold lines of the form name: "text with {{question}}"')
    check_templates(found, f"templates {path}: ")
    if len(found) < 2:
        raise ValueError(f"templates {path}: holds {len(found)}; how wording matters takes two or more")
    return {str(name): text for name, text in found.items()}


def check_templates(templates: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless each is a text with {question} in it and no field but {choices} beside it."""
    for name, text in templates.items():
        if wrong := _wrong_with(text):
            raise ValueError(f"{where}{name!r}: {wrong}")


def _wrong_with(text: Any) -> str:
    if not isinstance(text, str):
        return f"is no text but of type {type(text).__name__}"
    try:
        found = [field for field in string.Formatter().parse(text) if field[1] is not None]
    except ValueError as error:
        return f"{error}: write {{{{ and }}}} for braces that are meant as such"
    fields = {str(name) for _, name, _, _ in found}
    if fields - FIELDS or any(form or conversion for _, _, form, conversion in found):
        unknown = min(fields - FIELDS, default="with a conversion")
        return f"unknown field {{{unknown}}}: only {{question}} and {{choices}} are filled in"
    return "" if "question" in fields else "has no {question} in it"


def task_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The task that rows are of: `multiple_choice` if they have choices, `word_problems` if every answer ends in
    '#### number', else `instruction`."""
    if all("choices" in row for row in rows):
        return "multiple_choice"
    numbers = all(final_number(str(row["answer"])) is not None for row in rows)
    return "word_problems" if numbers else "instruction"


def prompt_scores(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], templates: Mapping[str, str], *,
    batch_size: int = 8, max_new_tokens: int = 128, wrap: Render | None = None, progress: Progress | None = None,
) -> dict[str, TemplateScores]:  # fmt: skip
    """Accuracy and answer NLL of every row under every template.

    Word problems: the model writes an answer, greedily; right is the number behind '####', or the last number where
    there is no '####'. Multiple choice: the model's choice is the likeliest by log-likelihood per character of its
    text, the NLL is that of the right choice's text. Instructions: the NLL of the answer alone.

    Args:
        rows: `{"question", "answer"}`; for multiple choice `{"question", "choices", "answer": index}`.
        templates: name -> text with {question}, and {choices} where wanted.
        wrap: what `render` is elsewhere, of `{"question": the filled-in template, "answer"}`.
        progress: called with 1 for each row that is finished under one template.

    Raises ValueError: no rows or templates; a template that isn't one; no chat template and no `wrap`.
    """
    if not rows or not templates:
        raise ValueError(f"no {'templates' if rows else 'rows'} to score")
    check_templates(templates, "template ")
    task, wrap = task_of(rows), wrap or chat_pair
    found = {}
    for name, template in templates.items():
        asked = [dict(row) | {"question": fill(template, row)} for row in rows]
        if task == "multiple_choice":
            found[name] = _choices(model, tokenizer, asked, batch_size, wrap, progress)
            continue
        options: dict[str, Any] = {"batch_size": batch_size, "render": wrap}
        last = options | {"progress": progress}  # of what is asked about a row
        if task == "instruction":
            scores = answer_nll(model, tokenizer, asked, **last)
            found[name] = TemplateScores(scores.nll, scores.tokens, None, [])
        else:
            scores = answer_nll(model, tokenizer, asked, **options)
            match = exact_match(model, tokenizer, asked, max_new_tokens=max_new_tokens, **last)
            found[name] = TemplateScores(scores.nll, scores.tokens, match.correct_any, match.text)
    return found


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's question, and its choices one a line, filled in."""
    choices = "\n".join(f"- {choice}" for choice in row.get("choices") or [])
    return template.format(question=row["question"], choices=choices)


def _choices(
    model: Model, tokenizer: Tokenizer, rows: list[dict[str, Any]], batch_size: int, wrap: Render,
    progress: Progress | None,
) -> TemplateScores:  # fmt: skip
    """Every choice is scored where the answer stands, without the end of the turn: that is no part of any choice."""

    def render(tokenizer: Tokenizer, row: Mapping[str, Any]) -> Asked:
        asked = Asked(*wrap(tokenizer, {**row, "answer": MARK}))
        before = asked.answer.partition(MARK)[0]  # some templates open an answer with empty reasoning
        return asked._replace(prompt=asked.prompt + before, answer=row["answer"])

    each = [dict(row) | {"answer": choice} for row in rows for choice in row["choices"]]
    scores = answer_nll(model, tokenizer, each, batch_size=batch_size, render=render)
    every = iter(zip(scores.nll, scores.tokens))
    found = []
    for row in rows:
        pairs = [next(every) for _ in row["choices"]]
        best = likeliest([-nll for nll, _ in pairs], row["choices"])
        found.append((*pairs[row["answer"]], best == row["answer"], row["choices"][best]))
        tick(progress)
    return TemplateScores(*map(list, zip(*found)))


def headline(models: Sequence[Mapping[str, TemplateScores]], metric: str = "auto") -> str:
    """`accuracy` or `nll`: which one to judge by. `auto`: accuracy, unless every model's mean is below 5 %.

    Raises ValueError: an unknown metric, or accuracy where the task has none.
    """
    one_of("metric", metric, METRICS)
    has_accuracy = all(scores.correct is not None for model in models for scores in model.values())
    if metric == "accuracy" and not has_accuracy:
        raise ValueError("these answers are free text, so there is no accuracy: use the metric nll")
    if metric != "auto":
        return metric
    if not has_accuracy:
        return "nll"
    best = max(_values(model, "accuracy").mean() for model in models)
    return "accuracy" if best > TOO_LOW - 1e-9 else "nll"  # 5 % itself is enough, rounding or not


def spread(scores: Mapping[str, TemplateScores], metric: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Spread:
    """Mean, standard deviation (over the templates, n - 1) and worst template of `accuracy` or `nll`.

    Raises ValueError: fewer than two templates, or accuracy where there is none.
    """
    if len(scores) < 2:
        raise ValueError("a spread over templates takes two or more of them")
    values = _values(scores, metric)
    drawn = resampled(*sums(scores, metric), resamples, seed)  # (resamples, templates)
    worst = (lambda v: v.min(-1)) if metric == "accuracy" else (lambda v: v.max(-1))
    names = list(scores)
    return Spread(
        metric,
        dict(zip(names, values.tolist())),
        percentiles(values.mean(), drawn.mean(1)),
        percentiles(values.std(ddof=1), drawn.std(1, ddof=1)),
        percentiles(worst(values), worst(drawn)),
        names[int(values.argmin() if metric == "accuracy" else values.argmax())],
    )


def spread_difference(
    ours: Mapping[str, TemplateScores], theirs: Mapping[str, TemplateScores], metric: str, *, seed: int = 0
) -> dict[str, Interval]:
    """`mean` and `std` of ours minus theirs, on the same rows and templates: paired, the same rows drawn for both.

    Raises ValueError: other templates or rows.
    """
    if list(ours) != list(theirs) or {len(s.nll) for s in ours.values()} != {len(s.nll) for s in theirs.values()}:
        raise ValueError("a difference needs the same templates and rows twice")
    our, their = (_values(scores, metric) for scores in (ours, theirs))
    our_drawn, their_drawn = (resampled(*sums(scores, metric), RESAMPLES, seed) for scores in (ours, theirs))
    statistics = {"mean": lambda v: v.mean(-1), "std": lambda v: v.std(-1, ddof=1)}
    return {name: percentiles(of(our) - of(their), of(our_drawn) - of(their_drawn)) for name, of in statistics.items()}


def sums(scores: Mapping[str, TemplateScores], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(what is summed, what it is divided by), both `(templates, rows)`."""
    if metric == "nll":
        return np.array([s.nll for s in scores.values()]), np.array([s.tokens for s in scores.values()], dtype=float)
    if any(s.correct is None for s in scores.values()):
        raise ValueError("these answers are free text, so there is no accuracy")
    right = np.array([s.correct for s in scores.values()], dtype=float)
    return right, np.ones_like(right)


def _values(scores: Mapping[str, TemplateScores], metric: str) -> np.ndarray:
    """The metric of each template, `(templates,)`: share of right rows, or nats per token."""
    over, under = sums(scores, metric)
    return over.sum(1) / under.sum(1)
