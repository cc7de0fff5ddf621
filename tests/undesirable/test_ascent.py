"""Eq. 2: the ascent."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_batch, tiny_model

from lfu import LfUStep
from lfu.step.step import sft_loss
from lfu.undesirable import ascend


@pytest.mark.parametrize("kind", ["lora", "steering", "own"])
def test_the_ascent_raises_the_sft_loss_by_alpha_times_the_norm(kind):
    """Eq. 2 to first order: l(aux + alpha g/||g||) = l + alpha ||g||."""
    model = tiny_model("llama")
    step = LfUStep(model, auxiliary=kind, alpha=1e-4)
    step.auxiliary.reset(lambda device: torch.Generator(device).manual_seed(0))
    batch = tiny_batch()
    with step.auxiliary.attached():
        loss = sft_loss(model, batch, 1.0)
        loss.backward()
        norm = ascend(step.auxiliary, step.auxiliary.take_gradients(), step.settings.alpha)
        moved = sft_loss(model, batch, 1.0)
    assert float((moved - loss).detach()) == pytest.approx(1e-4 * norm, rel=0.05)
