"""Where representations are read: the answer positions, and how much is kept of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_batch, tiny_model

from lfu import LfUStep
from lfu.model.representations import answer_positions


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 1))
@settings(max_examples=25, deadline=None)
def test_answer_positions(mask, shift):
    """As many as the loss averages over; at t - 1 (paper) or t (code) of each answer token after the first position."""
    labels = torch.tensor([[5 if m else -100 for m in mask], [-100] * 6])
    want = [t - (1 - shift) for t in range(1, 6) if mask[t]]
    assert answer_positions(labels, ("predict", "answer")[shift]).tolist() == want


def test_memory_kept_between_the_passes_is_that_of_the_answer_tokens():
    batch = tiny_batch()
    step = LfUStep(tiny_model("llama"))
    where = answer_positions(batch["labels"])
    with step.reader.reading(where, detach=True) as found:
        step.reader.run(batch)
    assert {tuple(h.shape) for h in found.values()} == {(len(where), 16)}
    assert len(where) == int((batch["labels"][:, 1:] != -100).sum())
