"""Anchor: training is held to what the untouched model says of its own accord."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from lfu.methods.chunks import sum_over_chunks
from lfu.methods.method import Batch, Method, Preparation, knob
from lfu.methods.own_text import own_text
from lfu.methods.weights import refuse_sharded_launch, refuse_sharding
from lfu.model.embedded import cache_folder
from lfu.model.precision import wide
from lfu.model.representations import Reader, answer_positions


@dataclass
class Anchor(Method):
    """`l = l_SFT + weight * (1/M) sum_t KL(r_t || p_t)` over the M tokens of a few texts that the model wrote itself.

    Before training the untouched model writes `texts` texts: a base model from its first token on, a chat model from an
    open user turn, so that it makes up question and answer. Of its distribution r_t at each token the `top` most likely
    tokens are kept, and the rest as one (the KL of these top + 1 is at most the whole one). Nobody's data and no second
    model are needed. In each micro-batch `batch` of the texts are drawn, by the run's seed.

    The texts are kept on disk, by the model's weights and the settings.
    """

    name: ClassVar[str] = "anchor"
    summary: ClassVar[str] = "KL to the untouched model on texts that it wrote itself"
    source: ClassVar[str] = "ours; the data as in Magpie, arXiv 2406.08464, and CFS, arXiv 2505.13811"
    protects: ClassVar[str] = "what the model says of its own accord"
    once: ClassVar[str] = "before training, texts generated (64 of 64 tokens); kept for later runs"
    places: ClassVar[tuple[str, ...]] = ("penalty",)

    weight: float = knob(1.0, "weight of the KL (none published)", low=0)
    texts: int = knob(64, "how many texts the model writes", low=1)
    tokens: int = knob(64, "longest text, in tokens that the model chooses", low=2)
    batch: int = knob(2, "texts per micro-batch", low=1)
    top: int = knob(64, "most likely tokens that are kept at each place", low=1)
    cache: str = knob("", "folder that keeps the texts (default: anchor in lfu's cache folder)", output=True)

    def adapter(self, config: Any, run: Preparation) -> Any:
        refuse_sharded_launch(run.args, self.name)
        folder = Path(self.cache).expanduser() if self.cache else cache_folder() / "anchor"
        elsewhere = "--method_args anchor.cache=FOLDER"
        self.said = own_text(run, folder, self.name, elsewhere, texts=self.texts, tokens=self.tokens, top=self.top)
        return config

    def setup(self, trainer: Any) -> None:
        refuse_sharding(trainer, self.name)

    def loss(self, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
        trainer, anatomy = batch.trainer, batch.trainer.anatomy
        rows = self._draw(batch)
        device = loss.device
        labels, depth = self.said.labels[rows].to(device), len(anatomy.blocks)
        positions = answer_positions(labels)
        if not len(positions):
            return loss
        inputs = {"input_ids": self.said.ids[rows].to(device), "attention_mask": self.said.mask[rows].to(device)}
        with Reader(anatomy, [depth]).reading(positions, detach=False) as hidden:
            Reader(anatomy, [depth]).run(inputs)
        places = positions.cpu() + 1  # of the tokens that are predicted
        top, log_r = (value[rows].flatten(0, 1)[places].to(device) for value in (self.said.top, self.said.log_p))
        divergence = lambda h, ids, r: kl_of_top(anatomy.logits(h), ids.to(h.device), r.to(h.device)).sum()
        value = sum_over_chunks(divergence, hidden[depth], top, log_r) / len(positions)
        trainer.log_metric("anchor/kl", float(value.detach()))
        return loss + self.weight * batch.share * value

    def _draw(self, batch: Batch) -> torch.Tensor:
        """Rows of the texts: the same for the same micro-batch, in a second pass and in a resumed run."""
        state, ids = batch.trainer.state, batch.inputs["input_ids"]
        mixed = (batch.trainer.args.seed * 1_000_003 + state.global_step) * 1_000_003 + int(ids.sum())
        generator = torch.Generator().manual_seed(mixed % 2**63)
        return torch.randperm(len(self.said.ids), generator=generator)[: self.batch]


def kl_of_top(logits: torch.Tensor, top: torch.Tensor, log_r: torch.Tensor) -> torch.Tensor:
    """`sum_i r_i (log r_i - log p_i)` over the tokens `top` and all others as one.

    Args:
        logits: `(N, V)`, p's.
        top: `(N, k)`, token ids.
        log_r: `(N, k)`, float32: r's log-probabilities of them.

    Returns:
        `(N,)` in float32 or wider.
    """
    log_p = wide(logits).log_softmax(-1).gather(-1, top)
    r, tiny = log_r.exp(), torch.finfo(log_p.dtype).tiny
    known = (r * (log_r - log_p)).sum(-1)
    rest = 1 - r.sum(-1)
    rest = torch.where(rest > 1e-5, rest, 0)  # below that it is rounding
    rest_p = (1 - log_p.exp().sum(-1)).clamp_min(tiny)
    return known + torch.where(rest > 0, torch.special.xlogy(rest, rest) - rest * rest_p.log(), 0)
