"""What did fine-tuning gain, and what did it forget? The same questions and texts before and after it.

Multiple-choice questions: how many were kept, lost, gained, never known; the net change with a paired bootstrap
interval and McNemar's test; and the lost ones to read. Plain texts: how much the perplexity rose.

A run that was measured while it was trained (lfu train --forgetting true, or ForgettingCallback) may stand alone: what
was measured then is shown again, with its curves, and no model is loaded."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from lfu.cli.probes import models, rows
from lfu.cli.probes.progress import phase
from lfu.support.errors import UserError, value_errors_are_the_users


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The probe's own flags."""
    models.add_base_and_tuned(parser)
    rows.add_data(parser, "multiple-choice questions (default: 307 built-in ones of general knowledge)")
    rows.add_texts(parser)
    parser.add_argument("--anew", action="store_true", help="measure again what was measured during training")


def measured(given: argparse.Namespace) -> dict[str, Any] | None:
    """The record of a run that was measured while it was trained, if it is the only model and still the same one."""
    if len(given.models) != 1 or given.data or given.texts or given.limit or given.anew:
        return None
    folder = Path(given.models[0]).expanduser()
    path = folder / "forgetting" / "record.json"
    if not path.is_file():
        return None
    from lfu.forgetting.fingerprint import saved_in

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = saved_in(folder, record["results"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not same:
        print(f"lfu probe: note: {path} is of other weights than {folder} has now; measuring anew", file=sys.stderr)
        return None
    print(f"lfu probe: note: as measured during training ({path}); --anew measures again", file=sys.stderr)
    return record


def measure(given: argparse.Namespace, command: str) -> dict[str, Any]:
    """Scores every model, one in memory at a time, and compares each tuned one with the base.

    Raises:
        UserError: models or data that can't be loaded; tokenizers that cut the texts differently.
    """
    if (record := measured(given)) is not None:
        return record
    names = models.base_and_tuned(given.models, "forgetting")
    questions, texts = rows.choices(given), rows.texts(given)
    _same_tokens(models.tokenizers(names, given), texts)

    from lfu.evaluation.forgetting import chosen, forgetting
    from lfu.evaluation.hidden import longest_input
    from lfu.evaluation.record import make_record
    from lfu.evaluation.score import multiple_choice, perplexity

    def score(label: str, model: Any, tokenizer: Any) -> tuple[Any, Any]:
        options = {"batch_size": given.batch_size}
        with phase(f"{label}: questions", len(questions)) as tick:
            found = multiple_choice(model, tokenizer, questions, progress=tick, **options)
        with phase(f"{label}: texts", len(texts)) as tick:
            window = longest_input(model)
            return found, perplexity(model, tokenizer, texts, window=window, progress=tick, **options)

    described, scores = models.each_model(names, given, score)
    base, *tuned = names
    answers, prose = ({label: each[place] for label, each in scores.items()} for place in (0, 1))
    return make_record(
        "forgetting",
        models=described,
        settings={
            "base": base,
            "questions": f"{given.data or 'built-in general knowledge'} ({len(questions)})",
            "texts": f"{given.texts or 'built-in prose'} ({len(texts)})",
        },
        results={
            "questions": [{key: row[key] for key in ("question", "choices", "answer")} for row in questions],
            "chosen": {label: chosen(each, questions) for label, each in answers.items()},
            "texts": prose,
            "forgetting": {
                label: forgetting(answers[base].correct, answers[label].correct, seed=given.seed) for label in tuned
            },
            "perplexity": {label: _perplexity(prose[base], prose[label], given.seed) for label in tuned},
        },
        command=command,
        seed=given.seed,
    )


def _same_tokens(tokenizers: dict[str, Any], texts: list[str]) -> None:
    """Raises UserError unless all models read the texts as the same tokens: else perplexities can't be compared."""
    (base, first), *others = tokenizers.items()
    wanted = first(texts)["input_ids"]
    for label, tokenizer in others:
        if tokenizer(texts)["input_ids"] != wanted:
            raise UserError(
                f"{label} and {base} have different vocabularies, so their perplexities can't be compared: "
                "give the model that it was fine-tuned from"
            )


def _perplexity(before: Any, after: Any, seed: int) -> dict[str, Any]:
    """Perplexities, and the log of their ratio with its interval."""
    from lfu.evaluation.forgetting import perplexity_change

    with value_errors_are_the_users():
        change = perplexity_change(before, after, seed=seed)
    return {"before": math.exp(before.mean), "after": math.exp(after.mean), "log_ratio": change}
