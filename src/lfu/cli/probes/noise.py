"""How steady are the hidden states under noisy input? Cosine similarity of clean and noisy ones, layer by layer.

Noise of NEFTune's strength is added to the embeddings: uniform(-1, 1) * alpha / sqrt(L * d), L tokens of width d. Only
the positions that predict an answer's tokens are compared, as in the paper's Figure 6."""

from __future__ import annotations

import argparse
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
    from lfu.evaluation.record import make_record

    with value_errors_are_the_users():
        renders = {label: render_of(tokenizer, given.template) for label, tokenizer in tokenizers.items()}

    def read(label: str, model: Any, tokenizer: Any) -> NoiseScores:
        with phase(f"{label}: noisy answers", len(pairs)) as tick:
            return noise_similarity(
                model, tokenizer, pairs, alpha=given.noise_alpha, draws=given.draws, seed=given.seed,
                batch_size=given.batch_size, render=renders[label], progress=tick,
            )  # fmt: skip

    described, scores = models.each_model(names, given, read)
    first, seed = next(iter(names)), given.seed
    comparable = [label for label in names if label != first and scores[label].tokens == scores[first].tokens]
    return make_record(
        "noise",
        models=described,
        settings={
            "data": f"{given.data or 'built-in word problems'} ({len(pairs)})",
            "template": given.template, "noise_alpha": given.noise_alpha, "draws": given.draws,
        },
        results={
            "scores": scores,
            "by_layer": {label: each.by_layer(seed=seed) for label, each in scores.items()},
            "overall": {label: each.overall(seed=seed) for label, each in scores.items()},
            "nll_rise": {label: each.nll_rise(seed=seed) for label, each in scores.items()},
            "against": first,
            "difference": {label: scores[label].against(scores[first], seed=seed) for label in comparable},
        },
        command=command,
        seed=seed,
    )  # fmt: skip
