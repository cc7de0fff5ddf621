"""How steady are the hidden states under noisy input? Cosine similarity of clean and noisy ones, layer by layer.

Noise of NEFTune's strength is added to the embeddings: uniform(-1, 1) * alpha / sqrt(L * d), L tokens of width d. Only
the positions that predict an answer's tokens are compared, as in the paper's Figure 6."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from lfu.cli.probes import models, rows
from lfu.cli.probes.progress import phase
from lfu.support.errors import UserError, value_errors_are_the_users


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The probe's own flags."""
    models.add_models(parser)
    rows.add_data(parser, "questions with answers (default: 100 built-in word problems)")
    rows.add_template(parser)
    parser.add_argument("--noise_alpha", type=float, default=5.0, metavar="A", help="noise scale (default: 5)")
    parser.add_argument("--draws", type=int, default=4, metavar="N", help="draws of noise for each row (default: 4)")


def measure(given: argparse.Namespace, command: str) -> dict[str, Any]:
    """Reads every model, one in memory at a time; models of one shape get the very same noise.

    Raises:
        UserError: models or data that can't be loaded; a scale or a number of draws out of range.
    """
    names = models.labelled(given.models)
    if not 0 <= given.noise_alpha < float("inf"):
        raise UserError(f"--noise_alpha must be a finite number, 0 or more, got {given.noise_alpha}")
    if given.draws < 1:
        raise UserError(f"--draws must be at least 1, got {given.draws}")
    pairs = rows.answered(rows.questions(given))
    tokenizers = models.tokenizers(names, given)

    from lfu.evaluation.noise import NoiseScores, noise_similarity
    from lfu.evaluation.prompts import render_of
    from lfu.evaluation.record import describe_model, make_record

    with value_errors_are_the_users():
        renders = {label: render_of(tokenizer, given.template) for label, tokenizer in tokenizers.items()}

    def read(label: str) -> tuple[dict[str, Any], NoiseScores]:
        def work(model: Any, tokenizer: Any) -> Any:
            with phase(f"{label}: noisy answers", len(pairs)) as tick:
                found = noise_similarity(
                    model, tokenizer, pairs, alpha=given.noise_alpha, draws=given.draws, seed=given.seed,
                    batch_size=given.batch_size, render=renders[label], progress=tick,
                )  # fmt: skip
            return describe_model(names[label], model), found

        return models.with_model(names[label], given, work)

    found = {label: read(label) for label in names}
    scores = {label: each for label, (_, each) in found.items()}
    first = next(iter(names))
    comparable = [label for label in names if label != first and scores[label].tokens == scores[first].tokens]
    return make_record(
        "noise",
        models={label: described for label, (described, _) in found.items()},
        settings={
            "data": f"{given.data or 'built-in word problems'} ({len(pairs)})",
            "template": given.template, "noise_alpha": given.noise_alpha, "draws": given.draws,
        },
        results={
            "scores": {label: asdict(each) for label, each in scores.items()},
            "by_layer": {
                label: [asdict(i) for i in each.by_layer(seed=given.seed)] for label, each in scores.items()
            },
            "overall": {label: asdict(each.overall(seed=given.seed)) for label, each in scores.items()},
            "nll_rise": {label: asdict(each.nll_rise(seed=given.seed)) for label, each in scores.items()},
            "against": first,
            "difference": {
                label: asdict(scores[label].against(scores[first], seed=given.seed)) for label in comparable
            },
        },
        command=command,
        seed=given.seed,
    )  # fmt: skip
