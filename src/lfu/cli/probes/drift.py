"""How far did fine-tuning move the model? Distance of the weights, and of the hidden states on the same tokens.

Weights: ||theta - theta0|| / ||theta0|| overall, by block and by kind of module; an adapter counts as merged. Hidden
states: mean cosine similarity and linear CKA by layer. One model is in memory at a time: the base's weights wait in a
file (as large as the model) in the folder for temporary files, its hidden states in memory."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfu.cli.probes import models, rows
from lfu.cli.probes.progress import phase
from lfu.support.errors import UserError, one_line, value_errors_are_the_users


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The probe's own flags."""
    models.add_base_and_tuned(parser)
    rows.add_texts(parser, ", or questions and answers, of which the answers' tokens count")
    rows.add_template(parser)


def measure(given: argparse.Namespace, command: str) -> dict[str, Any]:
    """Compares every tuned model with the base.

    Raises:
        UserError: models or data that can't be loaded; models of different shapes or vocabularies.
    """
    names = models.base_and_tuned(given.models, "drift")
    data, make_pieces = _data(given)
    tokenizers = models.tokenizers(names, given)
    base, *tuned = names

    from lfu.evaluation.drift import keep_weights, representation_drift, weight_drift, weights_on_disk
    from lfu.evaluation.hidden import hidden_states
    from lfu.evaluation.record import describe_model, make_record

    for label in tuned:
        if make_pieces(tokenizers[label], None) != make_pieces(tokenizers[base], None):
            raise UserError(f"{label} and {base} have different vocabularies: give the model that it was tuned from")

    def read(label: str, model: Any) -> Any:
        pieces = make_pieces(tokenizers[base], model)
        with phase(f"{label}: hidden states", len(pieces)) as tick:
            return hidden_states(model, tokenizers[base], pieces, batch_size=given.batch_size, progress=tick)

    with tempfile.TemporaryDirectory(prefix="lfu-drift-") as folder:
        file = Path(folder) / "base.safetensors"

        def first(model: Any, tokenizer: Any) -> Any:
            _keep(lambda: keep_weights(model, file), folder)
            return describe_model(names[base], model), read(base, model)

        described, hidden = models.with_model(names[base], given, first)

        def compare(label: str) -> tuple[dict[str, Any], Any, Any]:
            def work(model: Any, tokenizer: Any) -> Any:
                with weights_on_disk(file) as weights:
                    distance = weight_drift(weights, model)
                similarity = representation_drift(hidden, read(label, model), seed=given.seed)
                return describe_model(names[label], model), distance, similarity

            try:
                return models.with_model(names[label], given, work)
            except UserError as error:
                raise UserError(f"{label} against {base}: {error}") from error

        found = {label: compare(label) for label in tuned}
    return make_record(
        "drift",
        models={base: described} | {label: found[label][0] for label in tuned},
        settings={"base": base, "tokens of": data, "template": given.template, "cka": "linear, feature-space form"},
        results={
            "weights": {label: found[label][1] for label in tuned},
            "representations": {label: found[label][2] for label in tuned},
        },
        command=command,
        seed=given.seed,
    )


def _data(given: argparse.Namespace) -> tuple[str, Callable[[Any, Any], list[Any]]]:
    """(what is read, in words; a function from tokenizer and model to pieces that fit the model, or any if None)."""
    from lfu.evaluation.hidden import answer_pieces, longest_input, text_pieces
    from lfu.evaluation.prompts import render_of

    dataset = rows.load_texts(given) if given.texts is not None else None
    if dataset is None or "text" in dataset.column_names:
        texts = rows.texts(given)
        cut = lambda model: 1024 if model is None else longest_input(model)
        make = lambda tokenizer, model: text_pieces(tokenizer, texts, cut(model))
        what = f"{given.texts or 'built-in prose'} ({len(texts)})"
    else:
        pairs = rows.answered(rows.question_rows(dataset, given.texts))
        fits = lambda model: None if model is None else longest_input(model, most=2**20)
        make = lambda tokenizer, model: answer_pieces(
            tokenizer, pairs, render=render_of(tokenizer, given.template), window=fits(model)
        )
        what = f"{given.texts}, answers ({len(pairs)})"

    def checked(tokenizer: Any, model: Any) -> list[Any]:
        with value_errors_are_the_users():
            return make(tokenizer, model)

    return what, checked


def _keep(write: Callable[[], None], folder: str) -> None:
    """Writes the base's weights; a full disk is the user's to put right."""
    try:
        write()
    except Exception as error:  # safetensors has an error class of its own, and passes on others
        if isinstance(error, (ValueError, UserError)):
            raise
        raise UserError(
            f"no room for the base model's weights in {folder} ({one_line(error)}): set TMPDIR to a larger folder"
        ) from error
