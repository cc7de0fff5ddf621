"""STM: tokens that the untouched model finds too surprising are not trained on."""

import math

import torch

from lfu.methods.examples import IGNORED, key_of, losses_before_training
from lfu.methods.method import Method, knob
from lfu.methods.run import Trainer


class STM(Method):
    """A label counts only if `exp(- log p_start(y_t)) <= threshold`, p_start the untouched model.

    The labels of the training rows are masked once, from one forward over them, before training; so the loss is the
    mean over the tokens that are left. Evaluation rows stay as they are.
    """

    name = "stm"
    summary = "tokens of high perplexity for the untouched model carry no loss"
    source = "Wu et al., NeurIPS 2025, arXiv 2501.14315 (threshold 2.5)"
    protects = "what the model knows against tokens that it finds unlikely"
    once = "before training, one forward over the training rows"
    places = ("labels",)
    whole_weights = True

    threshold: float = knob(2.5, "largest perplexity of a token that is trained on (paper: 2.5)", above=1)

    def setup(self, trainer: Trainer) -> None:
        rows, labels, kept, total = trainer.train_dataset, [], 0, 0
        losses = losses_before_training(trainer, self.name)
        for row in rows:
            ids, old = torch.tensor(row["input_ids"]), torch.tensor(row.get("labels", row["input_ids"]))
            nll = torch.cat([losses[key_of(part)] for part in ids.split(row.get("seq_lengths") or max(len(ids), 1))])
            learned = (old != IGNORED) & ~nll.isnan()  # an example's first token is never predicted
            easy = learned & (nll <= math.log(self.threshold))
            labels.append(old.where(easy, IGNORED).tolist())
            kept, total = kept + int(easy.sum()), total + int(learned.sum())
        if not kept:
            raise ValueError(f"no training token has a perplexity of {self.threshold:g} or less: raise stm.threshold")
        columns = rows.remove_columns("labels") if "labels" in rows.column_names else rows
        trainer.train_dataset = columns.add_column("labels", labels)
        trainer.say(f"stm: {kept:,} of {total:,} labelled tokens have a perplexity of {self.threshold:g} or less")
