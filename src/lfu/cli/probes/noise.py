"""How steady are the hidden states under noisy input? Cosine similarity of clean and noisy ones, layer by layer.

Noise of NEFTune's strength is added to the embeddings: uniform(-1, 1) * alpha / sqrt(L * d), for L tokens of width d.
Only the positions that predict an answer's tokens are compared, as in the paper's Figure 6."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from lfu.cli import models
from lfu.cli.probes import Found, rows, template
from lfu.cli.progress import phase
from lfu.support.errors import value_errors_are_the_users
from lfu.support.flags import argument, at_least_one, from_zero, option


@dataclass(kw_only=True)
class Noise(rows.OfQuestions):
    """Reads every model under noise; models of one shape get the very same noise."""

    models: list[str] = argument("MODEL", models.HELP, nargs="+")
    template: str = template()
    noise_alpha: float = option(5.0, "noise scale", type=from_zero, metavar="A")
    draws: int = option(4, "draws of noise for each row", type=at_least_one)

    def measure(self) -> Found:
        names = models.labelled(self.models)
        dataset, where = self.questions(), f"data {self.source}"

        from lfu.evaluation.noise import NoiseScores, noise_similarity

        with value_errors_are_the_users():
            read = partial(rows.as_trained, dataset, where, self.template)
            asked = {label: read(tokenizer) for label, tokenizer in self.tokenizers(names).items()}

        def under_noise(label: str, model: Any, tokenizer: Any) -> NoiseScores:
            pairs, render = asked[label]
            with phase(f"{label}: noisy answers", len(pairs)) as tick:
                return noise_similarity(
                    model, tokenizer, pairs, alpha=self.noise_alpha, draws=self.draws, seed=self.seed,
                    batch_size=self.batch_size, render=render, progress=tick,
                )  # fmt: skip

        described, scores = self.each(names, under_noise)
        first, *others = names
        comparable = [label for label in others if scores[label].tokens == scores[first].tokens]
        settings = {
            "data": f"{self.source} ({len(dataset)})", "template": self.template, "noise_alpha": self.noise_alpha,
            "draws": self.draws,
        }  # fmt: skip
        return described, settings, {
            "scores": scores,
            "by_layer": {label: each.by_layer(seed=self.seed) for label, each in scores.items()},
            "overall": {label: each.overall(seed=self.seed) for label, each in scores.items()},
            "nll_rise": {label: each.nll_rise(seed=self.seed) for label, each in scores.items()},
            "against": first,
            "difference": {label: scores[label].against(scores[first], seed=self.seed) for label in comparable},
        }  # fmt: skip
