"""Never NaN in the weights: what of theta's gradient may stay where something was not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from lfu.model.tensors import global_norm, local
from lfu.step.record import Record, Skip

# reason -> how many parts of the measured gradients stay: earlier micro-batches' alone, or SFT's, too
PARTS = {
    Skip.ASCENT: 1,
    Skip.GRADIENT: 1,
    Skip.CONSISTENCY: 2,  # of a piece; those before it had their backward
    Skip.CONSISTENCY_GRADIENT: 2,
}


class BadBatch(ArithmeticError):
    """Raised under `on_bad_batch="raise"`; the gradients on theta are finite."""


def sound_parts(record: Record) -> int | None:
    """How many parts of `SplitGradients` to keep: all (None), not the consistency's, or the earlier alone."""
    return None if record.skipped is None else PARTS.get(Skip(record.skipped))


def check_finite(record: Record, theta: Sequence[nn.Parameter]) -> None:
    """The last word, over all of theta: entries that are not finite become zero, and the record says so."""
    gradients = [local(p.grad) for p in theta if p.grad is not None]
    if gradients and not math.isfinite(global_norm(gradients)):
        record.skip(Skip.GRADIENT)
        for g in gradients:
            g.nan_to_num_(0.0, 0.0, 0.0)
