"""Dynamic fine-tuning: each token's loss weighted by its own probability. TRL's own loss_type; the switch here."""

from typing import Any

from lfu.methods.method import Method


class DFT(Method):
    """`l = - (1/N) sum_t stop(p_t) log p_t`, with p_t = p(y_t | x, y_<t) held constant as a weight.

    Tokens that the model finds unlikely pull less, so that it is changed less where it disagrees with the data.
    """

    name = "dft"
    summary = "each token's loss weighted by its probability"
    source = "Wu et al. 2025, arXiv 2508.05629 (through TRL's loss_type='dft')"
    protects = "what the model knows against answers that it finds unlikely"
    places = ("token loss",)

    def configure(self, args: Any) -> None:
        args.loss_type = "dft"
