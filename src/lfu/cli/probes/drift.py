"""How far did fine-tuning move the model? Distance of the weights, and of the hidden states on the same tokens.

Weights: the norm of the change over the norm of the base's weights, overall, by block and by kind of module; an adapter
counts as merged. Hidden states: mean cosine similarity and linear CKA (a similarity that ignores rotation and scale) by
layer. One model is in memory at a time: the base's weights wait in a file as large as the model, in the folder for
temporary files."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.cli import models
from lfu.cli.probes import Found, Probe, rows, template
from lfu.cli.progress import phase
from lfu.support.errors import UserError, one_line, value_errors_are_the_users
from lfu.support.files import os_errors_only
from lfu.support.flags import argument


@dataclass(kw_only=True)
class Drift(Probe):
    """Compares every tuned model with the base."""

    models: list[str] = argument("BASE TUNED", models.BASE_AND_TUNED, nargs="+")
    texts: str | None = rows.texts(", or questions and answers, of which the answers' tokens count")
    template: str = template()

    def measure(self) -> Found:
        names = models.base_and_tuned(self.models, "drift")
        data, pieces_of = self._pieces()
        tokenizers = self.tokenizers(names)
        base, *tuned = names

        from lfu.evaluation.hidden import hidden_states
        from lfu.evaluation.representation_drift import representation_drift
        from lfu.evaluation.weight_drift import keep_weights, weight_drift

        rows.same_tokens(tokenizers, lambda tokenizer: pieces_of(tokenizer, None))

        def states(label: str, model: Any) -> Any:
            pieces = pieces_of(tokenizers[base], model)
            with phase(f"{label}: hidden states", len(pieces)) as tick:
                return hidden_states(model, tokenizers[base], pieces, batch_size=self.batch_size, progress=tick)

        with tempfile.TemporaryDirectory(prefix="lfu-drift-") as folder:
            start = Path(folder) / "base.safetensors"
            before: Any = None  # the base's hidden states; it comes first

            def work(label: str, model: Any, tokenizer: Any) -> tuple[Any, ...]:
                nonlocal before
                if label == base:
                    with _room(folder):
                        keep_weights(model, start)
                    before = states(base, model)
                    return ()
                with value_errors_are_the_users(f"{label} against {base}"):
                    distance = weight_drift(start, model)
                    return distance, representation_drift(before, states(label, model), seed=self.seed)

            described, found = self.each(names, work)
        settings = {"base": base, "tokens of": data, "template": self.template, "cka": "linear, feature-space form"}
        weights, hidden = ({label: found[label][place] for label in tuned} for place in (0, 1))
        return described, settings, {"weights": weights, "representations": hidden}

    def _pieces(self) -> tuple[str, Callable[[Any, Any], list[Any]]]:
        """(what is read, in words; (tokenizer, model) -> pieces that fit the model, or any if it is None)."""
        from lfu.data.load import load_rows
        from lfu.evaluation.pieces import answer_pieces, longest_input, text_pieces

        dataset = load_rows(self.texts, limit=self.limit) if self.texts else None
        if dataset is None or "text" in dataset.column_names:
            if self.template != "auto":
                raise UserError("--template is for questions, and --texts holds plain texts: drop it")
            texts = rows.texts_of(self.texts, self.limit)
            what = f"{self.texts or 'built-in prose'} ({len(texts)})"
        else:
            texts, what = [], f"{self.texts}, answers ({len(dataset)})"

        def pieces_of(tokenizer: Any, model: Any) -> list[Any]:
            with value_errors_are_the_users():
                if texts:
                    return text_pieces(tokenizer, texts, longest_input(model) if model else 1024)
                window = longest_input(model, most=2**20) if model else None
                pairs, render = rows.as_trained(dataset, f"texts {self.texts}", self.template, tokenizer)
                return answer_pieces(tokenizer, pairs, render=render, window=window)

        return what, pieces_of


@contextmanager
def _room(folder: str) -> Iterator[None]:
    """Says what to do if the disk is full while the block writes into the folder."""
    try:
        with os_errors_only(Path(folder)):
            yield
    except OSError as error:
        raise UserError(
            f"no room for the base model's weights in {folder} ({one_line(error)}): set TMPDIR to a larger folder"
        ) from error
