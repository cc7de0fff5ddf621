"""lm-evaluation-harness on a model in memory: its tasks, its numbers, and each item, leaving the model as it was."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lfu.evaluation.batching import evaluating, generators_kept
from lfu.evaluation.tasks import Runnable
from lfu.evaluation.tasks.quiet import Progress, quiet
from lfu.support.errors import UserError, one_line

_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
SHOWN = 1200  # characters of a text that are kept for reading


class TaskFailed(Exception):
    """This model can't be scored on this task; the message says why. Other tasks may still work."""


@dataclass(frozen=True)
class Settings:
    """What decides the numbers beside model and task."""

    limit: int | None = None  # the first so many items of each task; None: all
    batch_size: int = 8  # requests in one forward pass; it changes results by rounding alone
    max_length: int | None = None  # longest input in tokens; a longer one loses its beginning. None: the model's own
    apply_chat_template: bool = False  # put prompts into the tokenizer's chat template
    seed: int = 1234  # of the drawing of worked examples; this one is the harness's own


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    A text has `question`, `expected`, and what the model gave: `choices` with `loglik` (nats), or `generated`.
    """

    task: str
    num_fewshot: int
    scores: dict[str, float]  # the harness's metric (`acc,none`) -> its value, where that is a mean over the items
    items: dict[str, list[float]]  # the same metrics -> the value of each item, in order
    weights: list[float]  # of the items in the mean
    texts: list[dict[str, Any]]  # one an item; long ones keep their end
    truncated: int = 0  # prompts (batches, in generation) that were too long and lost their beginning


def run_task(
    model: Any, tokenizer: Any, task: Runnable, settings: Settings | None = None, *, progress: Progress | None = None
) -> TaskResult:
    """Scores a model in memory, also a `PeftModel`, on one task.

    The numbers are those of `lm_eval` called directly with the same model, items, batch size and seed. The model's
    train and eval flags, the tokenizer, and Python's, numpy's and torch's random generators are left as they were.

    Raises:
        TaskFailed: the model's log-likelihoods are not numbers, or the task's prompts don't fit into it.
        UserError: a chat template was asked for and there is none, or the GPU's memory does not suffice.
    """
    settings = settings or Settings()
    if settings.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template: leave --apply_chat_template out")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with evaluating(model), generators_kept(model), quiet(progress) as heard:
        own = copy.deepcopy(tokenizer)  # the harness may give it a padding token, and turns its padding side
        lm = HFLM(model, tokenizer=own, batch_size=settings.batch_size, max_length=settings.max_length)
        try:
            found = simple_evaluate(
                model=lm,
                tasks=task.task if isinstance(task.task, list) else [task.task],
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=task.override,
                limit=settings.limit,
                bootstrap_iters=0,
                apply_chat_template=settings.apply_chat_template,
                **dict.fromkeys(_SEEDS, settings.seed),
            )
        except torch.OutOfMemoryError as error:
            what = f"{task.name}: the GPU's memory does not suffice"
            raise UserError(f"{what}: lower --batch_size or --max_length") from error
        except (AssertionError, ValueError, IndexError) as error:
            raise TaskFailed(one_line(error)) from error
        leaves = [_leaf(leaf, found["samples"][leaf.task_name]) for leaf in task.leaves]
    result = _together(task, leaves, sum("truncat" in line.lower() for line in heard))
    _check_agreement(task, result, found)
    return result


def _leaf(task: Any, samples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """The items of one task, metric by metric, and their texts.

    Left out is a metric that isn't the mean of one number per item, or of which less is better.
    """
    items: dict[str, list[float]] = {}
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    for sample in ordered:
        for metric in sample["metrics"]:
            items.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    texts = [_text(task, sample) for sample in ordered if sample["filter"] == ordered[0]["filter"]]
    less = [name for name, more in task.higher_is_better().items() if more is False]
    averaged = {name for name, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean"} - {*less}
    number = (int, float, np.number, np.bool_)
    one_each = lambda values: len(values) == len(texts) and all(isinstance(value, number) for value in values)
    sound = [name for name, v in items.items() if name.partition(",")[0] in averaged and one_each(v)]
    return {name: [float(value) for value in items[name]] for name in sound}, texts


def _text(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, what was expected, and what the model gave."""
    doc, target = sample["doc"], sample["target"]
    question = task.doc_to_text(doc)
    if task.OUTPUT_TYPE == "generate_until":
        expected = " / ".join(map(str, target)) if isinstance(target, list) else target
        return {"question": _end(question), "expected": _end(expected), "generated": _end(sample["resps"][0][0])}
    loglik = [float(answers[0][0]) for answers in sample["resps"]]
    if any(math.isnan(value) for value in loglik):
        raise TaskFailed("the log-likelihoods are not numbers: the model's weights are broken")
    if task.OUTPUT_TYPE != "multiple_choice":
        greedy = bool(sample["resps"][0][0][1])
        return {"question": _end(question), "expected": _end(target), "loglik": loglik, "greedy": greedy}
    choices = [_end(choice) for choice in task.doc_to_choice(doc)]
    if task.multiple_input:  # the question holds the choice, the target is the same for all
        question, expected = " / ".join(choices), _end(choices[int(question)])
    else:
        right = target if isinstance(target, list) else [target]
        texts = [choices[one] if isinstance(one, int | np.integer) and one < len(choices) else one for one in right]
        expected = " / ".join(map(str, texts))
    return {"question": _end(question), "expected": expected, "choices": choices, "loglik": loglik[: len(choices)]}


def _end(text: Any) -> str:
    words = str(text)
    return words if len(words) <= SHOWN else f"... {words[-SHOWN:]}"


def _together(task: Runnable, leaves: Sequence[tuple[Any, Any]], truncated: int) -> TaskResult:
    """One task, or the tasks of a group or tag with all their items in a row."""
    metrics = [metric for metric in leaves[0][0] if all(metric in items for items, _ in leaves)]
    # A group of the harness weighs its tasks by their size, unless its definition says otherwise.
    listed = getattr(task.task, "aggregate_metric_list", None) or []
    alike = bool(listed) and not any(how.weight_by_size for how in listed)
    weights = [1 / len(texts) if alike else 1.0 for _, texts in leaves for _ in texts]
    items = {metric: [value for found, _ in leaves for value in found[metric]] for metric in metrics}
    scores = {metric: float(np.average(values, weights=weights)) for metric, values in items.items()}
    texts = [text for _, each in leaves for text in each]
    return TaskResult(task.name, task.num_fewshot, scores, items, weights, texts, truncated)


def _check_agreement(task: Runnable, result: TaskResult, found: Mapping[str, Any]) -> None:
    """Our mean over the items must be the harness's own number."""
    theirs = {**found["results"], **found.get("groups", {})}.get(task.name, {})
    for metric, value in result.scores.items():
        if metric in theirs and not math.isclose(value, float(theirs[metric]), abs_tol=1e-9):
            raise RuntimeError(f"{task.name}: the mean over the items is {value}, the harness says {theirs[metric]}")
