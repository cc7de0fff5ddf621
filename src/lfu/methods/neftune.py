"""NEFTune: uniform noise on the input embeddings while training. TRL's own; the switch and the paper's alpha here."""

from typing import Any

from lfu.methods.method import Method, knob


class NEFTune(Method):
    """`e' = e + alpha / sqrt(L d) * u`, u uniform in [-1, 1], for embeddings e of L tokens in d dimensions.

    TRL (through transformers) takes L as the padded length of the batch; the paper's code takes each row's own length,
    so on a batch with much padding TRL's noise is a little smaller.
    """

    name = "neftune"
    summary = "uniform noise on the input embeddings"
    source = "Jain et al. 2023, arXiv 2310.05914 (through TRL's neftune_noise_alpha)"
    protects = "against learning the training texts by heart"
    places = ("noise",)

    alpha: float = knob(5.0, "noise strength (paper: 5, also 10 and 15)", above=0)

    def configure(self, args: Any) -> None:
        if args.neftune_noise_alpha not in (None, self.alpha):
            raise ValueError(
                f"neftune_noise_alpha={args.neftune_noise_alpha:g} and neftune.alpha={self.alpha:g} disagree: with "
                "method='neftune' give method_args='neftune.alpha=...' alone"
            )
        args.neftune_noise_alpha = self.alpha
