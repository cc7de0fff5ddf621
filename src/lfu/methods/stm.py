"""STM: tokens that the untouched model finds too surprising are not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lfu.methods.examples import nll_before_training
from lfu.methods.method import Method, knob
from lfu.methods.weights import refuse_sharding


@dataclass
class STM(Method):
    """A label counts only if `exp(- log p_start(y_t)) <= threshold`, p_start the untouched model.

    The labels of the training rows are masked once, from one forward over them, before training; so the loss is the
    mean over the tokens that are left. Evaluation rows stay as they are.
    """

    name: ClassVar[str] = "stm"
    summary: ClassVar[str] = "tokens of high perplexity for the untouched model carry no loss"
    source: ClassVar[str] = "Wu et al., NeurIPS 2025, arXiv 2501.14315 (threshold 2.5)"
    protects: ClassVar[str] = "what the model knows against tokens that it finds unlikely"
    once: ClassVar[str] = "before training, one forward over the training rows"
    places: ClassVar[tuple[str, ...]] = ("labels",)

    threshold: float = knob(2.5, "largest perplexity of a token that is trained on (paper: 2.5)", above=1)

    def setup(self, trainer: Any) -> None:
        refuse_sharding(trainer, self.name)
        limit = float(torch.tensor(self.threshold).log())
        labels, kept, total = [], 0, 0
        rows = trainer.train_dataset
        for row, nll in zip(rows, nll_before_training(trainer, self.name)):
            old, there = torch.tensor(row.get("labels", row["input_ids"])), ~nll.isnan()
            labels.append(old.masked_fill(~there | (nll > limit), -100).tolist())
            kept, total = kept + int((nll <= limit).sum()), total + int(there.sum())
        if not kept:
            raise ValueError(
                f"method 'stm': no training token has a perplexity of {self.threshold:g} or less: raise stm.threshold"
            )
        columns = rows.remove_columns("labels") if "labels" in rows.column_names else rows
        trainer.train_dataset = columns.add_column("labels", labels)
        trainer.say(f"stm: {kept:,} of {total:,} labelled tokens have a perplexity of {self.threshold:g} or less")
