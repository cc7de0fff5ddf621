"""Anchor: training is held to what the untouched model says of its own accord."""

from typing import Any

import torch

from lfu.methods.method import Method, knob
from lfu.methods.own_text import own_text
from lfu.methods.run import Batch, Preparation
from lfu.methods.tokens import in_pieces, kl_of_top, read_last


class Anchor(Method):
    """`l = l_SFT + weight * (1/M) sum_t KL(r_t || p_t)` over the M tokens of a few texts that the model wrote itself.

    Before training the untouched model writes `texts` texts: a base model from its first token on, a chat model from an
    open user turn, so that it makes up question and answer. Of its distribution r_t at each token the `top` most likely
    tokens are kept, and the rest as one (the KL of these top + 1 is at most the whole one). Nobody's data and no second
    model are needed. In each micro-batch `batch` of the texts are drawn, by the run's seed.

    The texts are kept on disk, by the model's weights and the settings.
    """

    name = "anchor"
    summary = "KL to the untouched model on texts that it wrote itself"
    source = "ours; the data as in Magpie, arXiv 2406.08464, and CFS, arXiv 2505.13811"
    protects = "what the model says of its own accord"
    once = "before training, texts generated (64 of 64 tokens); kept for later runs"
    places = ("penalty",)
    whole_weights = True

    weight: float = knob(1.0, "weight of the KL (ours)", low=0)
    texts: int = knob(64, "how many texts the model writes (ours)", low=1)
    tokens: int = knob(64, "length of the longest text, in tokens that the model chooses (ours)", low=2)
    batch: int = knob(2, "texts per micro-batch, at most as many as `texts` (ours)", low=1)
    top: int = knob(64, "most likely tokens that are kept at each place (ours)", low=1)
    cache: str = knob("", "folder that keeps the texts (default: anchor in lfu's cache folder)", output=True)

    def __post_init__(self) -> None:
        if self.batch > self.texts:
            raise ValueError(f"anchor.batch={self.batch} is more than anchor.texts={self.texts}: lower it")

    def adapter(self, config: Any, run: Preparation) -> Any:
        self.said = own_text(run, self, top=self.top)
        return config

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        anatomy = batch.trainer.anatomy
        rows = self._draw(batch)
        hidden, places = read_last(anatomy, self.said.batch(rows, anatomy.device), detach=False)
        if not len(hidden):
            return loss
        top, log_r = (part[rows].flatten(0, 1)[places.cpu()] for part in (self.said.top, self.said.log_p))
        value = in_pieces(lambda h, *r: kl_of_top(anatomy.logits(h), *r), hidden, top, log_r).mean().to(loss.device)
        batch.trainer.log_metric("anchor/kl", float(value.detach()))
        return loss + self.weight * batch.share * value

    def _draw(self, batch: Batch) -> torch.Tensor:
        """Rows of the texts: the same for the same micro-batch, in a second pass and in a resumed run."""
        state, ids = batch.trainer.state, batch.inputs["input_ids"]
        mixed = (batch.trainer.args.seed * 1_000_003 + state.global_step) * 1_000_003 + int(ids.sum())
        generator = torch.Generator().manual_seed(mixed % 2**63)
        return torch.randperm(len(self.said.ids), generator=generator)[: self.batch]
