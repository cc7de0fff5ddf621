"""What did fine-tuning gain, and what did it forget? The same questions and texts before and after it.

Multiple-choice questions: how many were kept, lost, gained, never known; the net change with a paired bootstrap
interval and McNemar's test; and the lost ones to read. Plain texts: how much the perplexity rose.

A run that was measured while it was trained (lfu train --forgetting true, or ForgettingCallback) may stand alone: what
was measured then is shown again, with its curves, and no model is loaded."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lfu.cli import models
from lfu.cli.probes import Found, rows
from lfu.cli.progress import phase
from lfu.support.errors import UserError, value_errors_are_the_users
from lfu.support.flags import argument, switch
from lfu.support.words import tell


@dataclass(kw_only=True)
class Forgetting(rows.OfQuestions):
    """Compares each tuned model with the base, item by item."""

    models: list[str] = argument("BASE TUNED", models.BASE_AND_TUNED, nargs="+")
    data: str | None = rows.data("multiple-choice questions (default: 307 built-in ones of general knowledge)")
    texts: str | None = rows.texts()
    anew: bool = switch("", "measure again what was measured during training")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anew and len(self.models) > 1:
            raise UserError("--anew is for a single run: with several models, everything is measured anew")

    def record(self, command: str) -> dict[str, Any]:
        return self._earlier() or super().record(command)

    def _earlier(self) -> dict[str, Any] | None:
        """The record made while the one given run trained, unless flags ask for more or its weights have changed."""
        own = [f.name for f in fields(self) if f.name not in ("models", "output_dir", "trust_remote_code")]
        if len(self.models) != 1 or any(getattr(self, name) != getattr(Forgetting, name, None) for name in own):
            return None
        folder = Path(self.models[0]).expanduser()
        path = folder / "forgetting" / "record.json"
        if not path.is_file():
            return None
        from lfu.forgetting.fingerprint import saved_in

        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            same = saved_in(folder, record["results"]["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        what = (
            f"as measured during training ({path}); --anew measures again" if same
            else f"{path} is of other weights than {folder} has now; measuring anew"
        )  # fmt: skip
        tell(f"lfu probe: note: {what}")
        return record if same else None

    def measure(self) -> Found:
        names = models.base_and_tuned(self.models, "forgetting")
        questions, texts = self.choices(), rows.texts_of(self.texts, self.limit)
        rows.same_tokens(self.tokenizers(names), lambda tokenizer: tokenizer(texts)["input_ids"])

        from lfu.evaluation.forgetting import against_base
        from lfu.evaluation.pieces import longest_input
        from lfu.evaluation.score import multiple_choice, perplexity

        def score(label: str, model: Any, tokenizer: Any) -> tuple[Any, Any]:
            options: dict[str, Any] = {"batch_size": self.batch_size}
            with phase(f"{label}: questions", len(questions)) as tick:
                found = multiple_choice(model, tokenizer, questions, progress=tick, **options)
            with phase(f"{label}: texts", len(texts)) as tick:
                window = longest_input(model)
                return found, perplexity(model, tokenizer, texts, window=window, progress=tick, **options)

        described, scores = self.each(names, score)
        base = next(iter(names))
        chosen = {label: answers.chosen for label, (answers, _) in scores.items()}
        prose = {label: read for label, (_, read) in scores.items()}
        settings = {
            "base": base,
            "questions": f"{self.data or 'built-in general knowledge'} ({len(questions)})",
            "texts": f"{self.texts or 'built-in prose'} ({len(texts)})",
        }
        with value_errors_are_the_users():
            return described, settings, against_base(questions, chosen, prose, base, seed=self.seed)
